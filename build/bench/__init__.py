"""`python -m build.bench yaml/x.yaml`: compare our schemes with other engines on the same weights, in one run."""
