"""Reads and checks the YAML file and its overrides, and reports the line of every mistake."""
