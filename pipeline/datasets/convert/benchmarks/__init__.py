"""Benchmarks that are distributed as arrays of pixels: CIFAR-10 and 100, STL-10, SVHN."""
