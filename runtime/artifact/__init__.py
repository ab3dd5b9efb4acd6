"""The artifact on disk: its format, how it is checked, and the proofs that ship with it."""
