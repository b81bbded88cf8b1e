"""CUDA C++ kernels of the scan and its convolution, compiled at first use by the NVRTC that torch brings."""
