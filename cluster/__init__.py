"""More than one box: sharing artifacts, and serving them on a Ray cluster."""
