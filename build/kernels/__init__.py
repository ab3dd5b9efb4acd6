"""Hand-scheduled TIR, one operation a file, one folder a target; `table.py` says which kernel serves which operation."""
