"""CUDA kernels: TensorIR factories with their decisions, and the device functions they call."""
