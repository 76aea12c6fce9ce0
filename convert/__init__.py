"""Passes that write a new checkpoint."""
