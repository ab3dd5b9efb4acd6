"""Reads checkpoints of every supported format as one `Checkpoint`, with hyperparameters and tensors under our names."""
