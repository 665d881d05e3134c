#pragma once
#include "cpu/isa.h"

namespace qwen3 {

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
  Rows dx;
  float* dweight;     // [h]
};

QWEN3_DECLARE(rms_norm, RmsNorm)
QWEN3_DECLARE(rms_norm_backward, RmsNormBackward)

}  // namespace qwen3
