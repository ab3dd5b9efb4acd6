"""An opened artifact in memory, on each kind of machine."""
