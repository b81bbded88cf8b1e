"""Operators: selective scan, causal convolution, SSD, weight distance, and compiled layers for inference."""
