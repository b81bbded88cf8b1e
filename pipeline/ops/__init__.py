"""Operators: selective scan, causal convolution, SSD, products, norms, weight distance, and compiled layers for inference."""
