"""The artifact on disk: its format, how it is checked, and the proofs that travel with it."""
