#pragma once
#include "cpu/isa.h"

namespace qwen3 {

// What forward and backward share. Query i of sequence b sits at position q_start[b] + i and, when causal, sees the keys
// up to it. With cu_seqlens the sequences lie one after another in batch 0: sequence b has the tokens
// cu_seqlens[b] .. cu_seqlens[b + 1] - 1, of queries and keys alike.
struct AttentionShape {
  int64_t sequences, q_len, k_len, q_heads, k_heads, width;
  const int32_t* cu_seqlens;  // [sequences + 1] or null
  const int32_t* q_start;     // [sequences]; null: k_len - q_len
  bool causal;
  float scale;
};

struct Attention {
  AttentionShape shape;
  Heads q, k, v, out;
  float* lse;  // [sequences, q_len, q_heads] or [tokens, q_heads]
};

struct AttentionBackward {
  AttentionShape shape;
  Heads dout, q, k, v;
  Heads dq, dk, dv;
};

QWEN3_DECLARE(attention, Attention)
QWEN3_DECLARE(attention_backward, AttentionBackward)

}  // namespace qwen3
