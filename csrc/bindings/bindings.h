// What the pybind11 files share. Tensors arrive as (address, dtype code, row stride) tuples made by qwen3_kernels/cpu/_core.py.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <tuple>

#include "common.h"

namespace py = pybind11;

namespace qwen3 {

using TensorArg = std::tuple<uintptr_t, int, int64_t>;  // address (0: absent), DType, stride between rows in elements

inline Rows rows(const TensorArg& t) {
  const auto& [address, dtype, stride] = t;
  if (dtype < 0 || dtype > 2) throw std::invalid_argument("dtype code " + std::to_string(dtype) + "; expected 0, 1 or 2");
  return {reinterpret_cast<void*>(address), DType(dtype), stride};
}
using HeadsArg = std::tuple<uintptr_t, int, int64_t, int64_t, int64_t>;  // address, DType, strides of batch, token, head
inline Heads heads(const HeadsArg& t) {
  const auto& [address, dtype, batch, token, head] = t;
  return {reinterpret_cast<void*>(address), DType(dtype), batch, token, head};
}
template <class T = float> inline T* pointer(uintptr_t address) { return reinterpret_cast<T*>(address); }

}  // namespace qwen3
