"""C++ kernels for the CPU, compiled at first use: the scan with its convolution, and EfficientViM's layers."""
