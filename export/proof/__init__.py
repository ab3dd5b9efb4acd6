"""The correctness ladder: implementations that are compared, and how."""
