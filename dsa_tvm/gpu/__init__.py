"""NVIDIA GPUs in Python: their architectures, and the CUDA driver."""
