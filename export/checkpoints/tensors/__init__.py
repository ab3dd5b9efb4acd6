"""Sources of tensors: files, and views of other sources."""
