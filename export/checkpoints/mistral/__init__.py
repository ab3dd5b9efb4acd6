"""Folders in Mistral's own format, and Mistral's own tokenizers."""
