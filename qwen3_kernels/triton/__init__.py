"""Triton kernels: one file per op, as in ops/. No autotuning; tile sizes are small tables with their reasons beside them."""
