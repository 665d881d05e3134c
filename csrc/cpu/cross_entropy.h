#pragma once
#include "cpu/isa.h"

namespace qwen3 {

struct CrossEntropy {
  int64_t n, v;  // rows, classes
  Rows logits;
  const int64_t* labels;  // [n], each in [0, v) or ignore_index
  int64_t ignore_index;
  float *nll, *lse;       // [n]
};

struct CrossEntropyBackward {
  int64_t n, v;
  const float *dnll, *dlse;  // [n]; dlse may be null
  Rows logits;
  const int64_t* labels;
  int64_t ignore_index;
  const float* lse;
  Rows dlogits;
};

QWEN3_DECLARE(cross_entropy, CrossEntropy)
QWEN3_DECLARE(cross_entropy_backward, CrossEntropyBackward)

}  // namespace qwen3
