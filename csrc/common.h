// Types shared by the CPU and CUDA kernels. No torch headers anywhere below csrc: one binary serves every torch.
#pragma once
#include <cstdint>

namespace qwen3 {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

// A tensor of rows: element (i, j) is data[i * stride + j].
struct Rows {
  void* data;
  DType dtype;
  int64_t stride;
};

// Element (b, t, h, d) is data[b * batch + t * token + h * head + d].
struct Heads {
  void* data;
  DType dtype;
  int64_t batch, token, head;
};

}  // namespace qwen3
