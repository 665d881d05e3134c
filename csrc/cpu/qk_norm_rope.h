#pragma once
#include "cpu/isa.h"

namespace qwen3 {

// One of q and k; each is a call of its own.
struct NormRope {
  int64_t n, heads, d, r;  // tokens, heads, head width, rows of cos and sin; token i uses row i % r
  float eps;
  Heads x;
  Rows weight;             // one row
  const float *cos, *sin;  // [r, d / 2]
  Heads out;
};

struct NormRopeBackward {
  int64_t n, heads, d, r;
  float eps;
  Heads dout, x;
  Rows weight;
  const float *cos, *sin;
  Heads dx;
  float* dweight;  // [d]
};

QWEN3_DECLARE(norm_rope, NormRope)
QWEN3_DECLARE(norm_rope_backward, NormRopeBackward)

}  // namespace qwen3
