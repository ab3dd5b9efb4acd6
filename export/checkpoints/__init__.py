"""Checkpoints of every supported format as one `Checkpoint`: hyper-parameters, tensors and tokenizer under our names."""
