"""The correctness ladder: the implementations to compare, and their comparison."""
