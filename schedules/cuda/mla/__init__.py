"""The CUDA sparse attention."""
