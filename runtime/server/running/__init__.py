"""The model in its thread, and the requests that it has."""
