"""Hand-scheduled TIR: a file per operation, a folder per target. `table.py` lists the kernel for each operation."""
