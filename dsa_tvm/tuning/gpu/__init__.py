"""Tuning for GPUs: building candidates with nvcc and measuring them, perhaps on another machine."""
