"""C++ kernels: csrc/cpu through the compiled module ``_cpu``. One file per op, as in ops/."""
