"""CUDA kernels: csrc/cuda through the compiled module ``_cuda``. One file per op, as in ops/."""
