"""`python -m build.bench yaml/x.yaml`: our schemes against other engines on the same weights, in one run."""
