"""CUDA kernels: TensorIR factories with their decisions, and the device functions that they call."""
