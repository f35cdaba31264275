"""What a person learns of a run beyond its loss: speed, samples, where a NaN began, and a plan."""
