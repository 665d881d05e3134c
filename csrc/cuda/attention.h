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

struct AttentionBackward {
  int64_t sequences, length, q_heads, k_heads;
  const int32_t* cu_seqlens;
  bool causal;
  float scale;
  Heads q, k, v, dout;
  const void* out;   // as attention wrote them
  const float* lse;
  void *dq, *dk, *dv;  // [tokens, heads, 128], contiguous
  // Scratch, for tiles = attention_backward_tiles():
  float *lse_log2, *delta;  // [tiles, q_heads, 128]
  float* dq_sum;            // [tiles, q_heads, 2, 64 * 128]
  int32_t* turns;           // [tiles, q_heads, 2]
  int32_t* ticket;          // [1]
  int variant = 0;
  float scale_log2 = 0;     // set by the launch
};

void attention_backward(const AttentionBackward&, uintptr_t stream);
int64_t attention_backward_tiles(bool packed, int64_t sequences, int64_t length);

}  // namespace qwen3::cuda
