"""The parts of `benchmarks/engine.py`, a file each."""
