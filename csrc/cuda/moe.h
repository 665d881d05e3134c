#pragma once
#include "common.h"

namespace qwen3::cuda {

// The experts of a mixture-of-experts block, bf16: d wide outside, i wide inside. Rows are assignments of a token to an
// expert, sorted by expert; rows from offsets[experts] on (assignments to no expert) are neither read nor written. All
// widths are multiples of 8 and all rows start on 16-byte boundaries.
struct MoePlan {
  int64_t experts, rows;
  const int32_t* offsets;  // [experts + 1] first row of each expert
  const int32_t* token;    // [rows] the token of a row
  const int32_t* slot;     // [rows] token * k + choice
};

// Element (e, r, c) is data[e * expert + r * row + c].
struct Experts {
  void* data;
  DType dtype;
  int64_t expert, row;
};

// h [rows, 2 i] = x[token] @ gate_up[e]^T (gate_up [experts, 2 i, d]: gate rows, then up rows); a [rows, i] =
// silu(gate) * up
void moe_up(const MoePlan&, int64_t d, int64_t i, Rows x, Experts gate_up, Rows h, Rows a, uintptr_t stream);

// y [rows, d] = a @ down[e]^T (down [experts, d, i])
void moe_down(const MoePlan&, int64_t d, int64_t i, Rows a, Experts down, Rows y, uintptr_t stream);

// With da = grad[token] @ down[e] and s = weights[slot]: dweights[slot] = sum(da * a) along a row (0 without expert),
// dh = the gradient of h when a's is s * da, scaled = s * a. partial: moe_partials(rows, i) floats.
void moe_down_backward(const MoePlan&, int64_t d, int64_t i, Rows grad, Experts down, Rows h, const float* weights,
                       float* dweights, Rows dh, Rows scaled, float* partial, uintptr_t stream);
int64_t moe_partials(int64_t rows, int64_t i);

// dx [rows, d] = dh @ gate_up[e]
void moe_up_backward(const MoePlan&, int64_t d, int64_t i, Rows dh, Experts gate_up, Rows dx, uintptr_t stream);

// out[e] [left_width, right_width] (fp32 or bf16) = (or += when accumulate) sum over the expert's rows of left^T right.
// The gathered operand has a row per token, the other one a row per row of the plan.
void moe_weight_grad(const MoePlan&, int64_t left_width, Rows left, int64_t right_width, Rows right, bool gather_left,
                     Experts out, bool accumulate, uintptr_t stream);

// out [tokens, d] = sum over j < k, in order, of y[inverse[token * k + j]], each times its weight unless weights is
// null
void moe_combine(const MoePlan&, int64_t tokens, int64_t k, int64_t d, Rows y, const int32_t* inverse,
                 const float* weights, Rows out, uintptr_t stream);

// A dense feed-forward block's. h [n, 2 i] = (x @ gate^T, x @ up^T), a [n, i] = silu(h's first half) * the second;
// gate, up [i, d]
void swiglu_up(int64_t n, int64_t d, int64_t i, Rows x, Rows gate, Rows up, Rows h, Rows a, uintptr_t stream);

// dh [n, 2 i] = the gradient of h when a's is dy @ down, and a again; down [d, i]
void swiglu_down_backward(int64_t n, int64_t d, int64_t i, Rows dy, Rows down, Rows h, Rows dh, Rows a, uintptr_t stream);

}  // namespace qwen3::cuda
