"""Hugging Face folders: configuration, weight files, and what they say of the tokenizer."""
