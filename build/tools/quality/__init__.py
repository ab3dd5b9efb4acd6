"""What each way of storing weights costs in quality: `python -m build.tools.quality yaml/x.yaml`."""
