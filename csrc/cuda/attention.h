#pragma once
#include "common.h"

namespace qwen3::cuda {

// Self-attention of whole sequences, bf16, head width 128, scale > 0. With cu_seqlens the sequences are documents packed in
// batch 0, `length` tokens in all.
struct Attention {
  int64_t sequences, length, q_heads, k_heads;
  const int32_t* cu_seqlens;  // [sequences + 1] or null
  bool causal;
  float scale;
  Heads q, k, v;
  void* out;   // [tokens, q_heads, 128], contiguous
  float* lse;  // [tokens, q_heads]
};

void attention(const Attention&, uintptr_t stream);

}  // namespace qwen3::cuda
