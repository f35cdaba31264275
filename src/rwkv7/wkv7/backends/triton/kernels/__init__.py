"""Device code: everything that Triton compiles. Importing a module in here imports triton."""
