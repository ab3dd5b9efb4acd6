"""Sharing artifacts through a folder or an object store, so that a new version sends only what changed."""
