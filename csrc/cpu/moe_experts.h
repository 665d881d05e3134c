#pragma once
#include "cpu/isa.h"

namespace qwen3 {

// out[r] = weight[e] a[r] for the rows r of every expert e that has 1 to `most` of them; weight[e] is [n, k].
struct MoeRows {
  int64_t experts, n, k, most;
  const int32_t* offsets;  // [experts + 1]
  const int32_t* source;   // row r is a[source[r]]; null for a[r]
  Rows a, weight;          // the weight's row e * n + j is row j of expert e
  Rows out;
};

QWEN3_DECLARE(moe_rows, MoeRows)

}  // namespace qwen3
