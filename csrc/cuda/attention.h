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

// What stood before q or k: a norm of each head and RoPE (qk_norm_rope). With it the gradient is that of `x`.
struct NormRope {
  Heads x;
  const float *weight, *cos, *sin;  // [128], [rows, 64]; token n has row n % rows
  int64_t rows;
  float eps;
  float* dweight;  // [attention_backward_shares(tiles, heads), 128], to be summed
};

struct AttentionBackward {
  int64_t sequences, length, q_heads, k_heads;
  const int32_t* cu_seqlens;
  bool causal;
  float scale;
  Heads q, k, v, dout;
  const void* out;  // as attention wrote them
  const float* lse;
  Heads dq, dk, dv;  // batches follow one another
  // Scratch, for tiles = attention_backward_tiles():
  float *lse_log2, *delta;  // [tiles, q_heads, 128]
  float* dq_sum;            // [tiles, q_heads, 2, 64 * 128]
  float* dk_sum;            // [tiles, k_heads, 2, 64 * 128], with a prologue
  int32_t* turns;           // [tiles, q_heads, 2]
  int32_t* ticket;          // [1]
  const NormRope* prologue = nullptr;  // none, or those of q and k
};

void attention_backward(const AttentionBackward&, uintptr_t stream);
int64_t attention_backward_tiles(bool packed, int64_t sequences, int64_t length);
int64_t attention_backward_shares(int64_t tiles, int64_t heads);

}  // namespace qwen3::cuda
