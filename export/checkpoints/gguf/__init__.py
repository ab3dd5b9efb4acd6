"""GGUF files: their headers, tensors and tokenizers."""
