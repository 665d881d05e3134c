// The CUDA kernels' host functions. They launch on the given stream (a cudaStream_t), never synchronise, and throw
// std::invalid_argument for what they cannot run and std::runtime_error for a CUDA error.
#pragma once
#include "common.h"

namespace qwen3::cuda {

struct RmsNorm {
  int64_t n, h;       // rows, width
  float eps;
  Rows x, residual;   // residual.data may be null
  Rows weight;        // one row
  Rows y, sum;        // sum = x + residual, written only with a residual
  float* rstd;        // [n]
};

struct RmsNormBackward {
  int64_t n, h;
  Rows dy, dsum;      // dsum.data may be null
  Rows sum, weight;   // sum: what was normalised
  const float* rstd;
  Rows dx, dweight;
  float* partial;     // [rms_norm_partials(n, h), h]
};

void rms_norm(const RmsNorm&, uintptr_t stream);
void rms_norm_backward(const RmsNormBackward&, uintptr_t stream);
int rms_norm_partials(int64_t n, int64_t h);

}  // namespace qwen3::cuda
