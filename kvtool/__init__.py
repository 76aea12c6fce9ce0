"""Smaller KV caches for ordinary language models: measured, decided, written down, run."""

__version__ = "0.1.0"
