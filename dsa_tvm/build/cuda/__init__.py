"""The CUDA part of a library: which kernels, their text, their machine code and the table that the launcher reads."""
