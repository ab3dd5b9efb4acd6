"""The YAML file and its overrides, checked, with the line of every mistake."""
