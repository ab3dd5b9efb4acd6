"""A model written in another format."""
