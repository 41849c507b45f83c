"""From OpSpecs, kernels and decisions to shared libraries."""
