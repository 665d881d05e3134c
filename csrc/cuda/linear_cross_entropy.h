#pragma once
#include "common.h"

namespace qwen3::cuda {

// One chunk of tokens of the fused head and cross-entropy. See linear_cross_entropy.cu for the method.
struct LinearCrossEntropy {
  int64_t n, h, v;          // tokens, hidden size, vocabulary
  Rows hidden, head;        // [n, h], [v, h] bf16
  const int64_t* labels;    // [n]
  int64_t ignore_index;
  float inverse_temperature, z_loss;
  const float* weight;      // [n] gradient of the loss with respect to each token's loss; null: no gradients
  float *nll, *lse, *entropy;  // [n]; entropy may be null
  Rows unnormalised;        // [n, v] bf16 out: dlogits = row_scale * unnormalised, but for the labels; null without gradients
  Rows scaled_hidden;       // [n, h] bf16 out: row_scale * hidden
  float *row_scale, *label_factor;  // [n] out; label_factor: dlogits of the label
  float* scratch;           // linear_cross_entropy_scratch(n, v) floats
};

void linear_cross_entropy(const LinearCrossEntropy&, uintptr_t stream);
int64_t linear_cross_entropy_scratch(int64_t n, int64_t v);

// head_grad [v, h] = unnormalised^T scaled_hidden of a chunk, or with `add` that added to what is there; bf16.
void head_gradient(int64_t n, int64_t h, int64_t v, Rows unnormalised, Rows scaled_hidden, Rows head_grad, bool add,
                   uintptr_t stream);

}  // namespace qwen3::cuda
