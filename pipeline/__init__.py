"""The library: knows nothing of any stage."""

__version__ = "0.1.0"
