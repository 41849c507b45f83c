"""Kernels for CPUs: TensorIR factories whose parameters are the decisions of a search."""
