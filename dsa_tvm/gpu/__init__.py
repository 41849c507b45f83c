"""NVIDIA GPUs as Python sees them: their architectures, and the CUDA driver."""
