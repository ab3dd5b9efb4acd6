"""Other APIs over chat."""
