"""Tokenizer files, added tokens and chat templates, whichever format they lie in."""
