"""What `python -m runtime.bench` measures of an artifact's slots: sequences side by side, second turns, speculation."""
