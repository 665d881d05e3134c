#pragma once
#include "cpu/isa.h"

namespace qwen3 {

struct Swiglu {
  int64_t n, width;
  Rows gate, up;
  Rows y;
};

struct SwigluBackward {
  int64_t n, width;
  Rows dy, gate, up;
  Rows dgate, dup;
};

QWEN3_DECLARE(swiglu, Swiglu)
QWEN3_DECLARE(swiglu_backward, SwigluBackward)

}  // namespace qwen3
