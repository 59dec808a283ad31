"""Compiles Triton's kernels ahead of time, for GPUs that are not present."""
