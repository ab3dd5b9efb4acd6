"""One file for the inference box: artifact, runtime, packages, golden prompts and signature."""
