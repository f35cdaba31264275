"""What a person learns of a run: log, progress, speed, samples, where a NaN began, and a plan."""
