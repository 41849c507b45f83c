"""The CUDA token selector."""
