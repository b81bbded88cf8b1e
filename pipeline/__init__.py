"""The library: knows nothing of any stage."""
