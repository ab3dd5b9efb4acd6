"""Attention over rings of keys and values on a CPU; `kernel.py` is where to begin."""
