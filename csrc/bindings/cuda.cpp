#include "bindings/bindings.h"
#include "cuda/attention.h"
#include "cuda/kernels.h"
#include "cuda/linear_cross_entropy.h"
#include "cuda/moe.h"

using namespace qwen3;

namespace {

using ExpertsArg = std::tuple<uintptr_t, int, int64_t, int64_t>;  // address, DType, strides of expert and row
cuda::Experts experts(const ExpertsArg& t) {
  const auto& [address, dtype, expert, row] = t;
  return {reinterpret_cast<void*>(address), DType(dtype), expert, row};
}
using PlanArg = std::tuple<int64_t, int64_t, uintptr_t, uintptr_t, uintptr_t>;  // experts, rows, offsets, token, slot
cuda::MoePlan plan(const PlanArg& t) {
  const auto& [experts, rows, offsets, token, slot] = t;
  return {experts, rows, pointer<int32_t>(offsets), pointer<int32_t>(token), pointer<int32_t>(slot)};
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels on raw pointers and a stream handle; use the ops of qwen3_kernels instead.";
  m.def("rms_norm_partials", &cuda::rms_norm_partials, "Rows of the partial buffer that rms_norm_backward needs.");
  m.def("rms_norm", [](int64_t n, int64_t h, float eps, TensorArg x, TensorArg residual, TensorArg weight, TensorArg y,
                       TensorArg sum, uintptr_t rstd, uintptr_t stream) {
    cuda::rms_norm({n, h, eps, rows(x), rows(residual), rows(weight), rows(y), rows(sum), pointer(rstd)}, stream);
  });
  m.def("rms_norm_backward", [](int64_t n, int64_t h, TensorArg dy, TensorArg dsum, TensorArg sum, TensorArg weight,
                                uintptr_t rstd, TensorArg dx, TensorArg dweight, uintptr_t partial, uintptr_t stream) {
    cuda::rms_norm_backward({n, h, rows(dy), rows(dsum), rows(sum), rows(weight), pointer(rstd), rows(dx), rows(dweight),
                             pointer(partial)}, stream);
  });
  m.def("attention", [](int64_t sequences, int64_t length, int64_t q_heads, int64_t k_heads, uintptr_t cu_seqlens, bool causal,
                        float scale, HeadsArg q, HeadsArg k, HeadsArg v, uintptr_t out, uintptr_t lse, uintptr_t stream) {
    cuda::attention({sequences, length, q_heads, k_heads, pointer<int32_t>(cu_seqlens), causal, scale, heads(q), heads(k),
                     heads(v), pointer<void>(out), pointer(lse)}, stream);
  });
  m.def("attention_backward_tiles", &cuda::attention_backward_tiles, "Tiles of 128 tokens by which the scratch is laid out.");
  m.def("attention_backward_shares", &cuda::attention_backward_shares, "Rows of a norm's gradient, to be summed.");
  using PrologueArg = std::tuple<HeadsArg, uintptr_t, uintptr_t, uintptr_t, int64_t, float, uintptr_t>;
  m.def("attention_backward", [](int64_t sequences, int64_t length, int64_t q_heads, int64_t k_heads, uintptr_t cu_seqlens,
                                 bool causal, float scale, HeadsArg q, HeadsArg k, HeadsArg v, HeadsArg dout, uintptr_t out,
                                 uintptr_t lse, HeadsArg dq, HeadsArg dk, HeadsArg dv, uintptr_t rows, uintptr_t dq_sum,
                                 uintptr_t dk_sum, uintptr_t counters, const std::vector<PrologueArg>& prologues, uintptr_t stream) {
    const int64_t tiles = cuda::attention_backward_tiles(cu_seqlens != 0, sequences, length) * q_heads;
    std::vector<cuda::NormRope> before;
    for (const auto& [x, weight, cos, sin, table, eps, dweight] : prologues)
      before.push_back({heads(x), pointer(weight), pointer(cos), pointer(sin), table, eps, pointer(dweight)});
    cuda::attention_backward({sequences, length, q_heads, k_heads, pointer<int32_t>(cu_seqlens), causal, scale, heads(q), heads(k),
                              heads(v), heads(dout), pointer<void>(out), pointer(lse), heads(dq), heads(dk),
                              heads(dv), pointer(rows), pointer(rows) + tiles * 128, pointer(dq_sum), pointer(dk_sum),
                              pointer<int32_t>(counters), pointer<int32_t>(counters) + 2 * tiles,
                              before.empty() ? nullptr : before.data()}, stream);
  });
  m.def("linear_cross_entropy_scratch", &cuda::linear_cross_entropy_scratch, "Floats of scratch that a chunk needs.");
  m.def("linear_cross_entropy", [](int64_t n, int64_t h, int64_t v, TensorArg hidden, TensorArg head, uintptr_t labels,
                                   int64_t ignore_index, float inverse_temperature, float z_loss, uintptr_t weight,
                                   uintptr_t nll, uintptr_t lse, uintptr_t entropy, TensorArg unnormalised,
                                   TensorArg scaled_hidden, uintptr_t row_scale, uintptr_t label_factor, uintptr_t scratch,
                                   uintptr_t stream) {
    cuda::linear_cross_entropy({n, h, v, rows(hidden), rows(head), pointer<int64_t>(labels), ignore_index,
                                inverse_temperature, z_loss, pointer(weight), pointer(nll), pointer(lse), pointer(entropy),
                                rows(unnormalised), rows(scaled_hidden), pointer(row_scale), pointer(label_factor), pointer(scratch)},
                               stream);
  });
  m.def("head_gradient", [](int64_t n, int64_t h, int64_t v, TensorArg unnormalised, TensorArg scaled_hidden,
                            TensorArg head_grad, bool add, uintptr_t stream) {
    cuda::head_gradient(n, h, v, rows(unnormalised), rows(scaled_hidden), rows(head_grad), add, stream);
  });
  m.def("moe_up", [](PlanArg p, int64_t d, int64_t i, TensorArg x, ExpertsArg gate_up, TensorArg h, TensorArg a,
                     uintptr_t stream) {
    cuda::moe_up(plan(p), d, i, rows(x), experts(gate_up), rows(h), rows(a), stream);
  });
  m.def("swiglu_up", [](int64_t n, int64_t d, int64_t i, TensorArg x, TensorArg gate, TensorArg up, TensorArg h, TensorArg a,
                        uintptr_t stream) {
    cuda::swiglu_up(n, d, i, rows(x), rows(gate), rows(up), rows(h), rows(a), stream);
  });
  m.def("swiglu_down_backward", [](int64_t n, int64_t d, int64_t i, TensorArg dy, TensorArg down, TensorArg h, TensorArg dh,
                                   TensorArg a, uintptr_t stream) {
    cuda::swiglu_down_backward(n, d, i, rows(dy), rows(down), rows(h), rows(dh), rows(a), stream);
  });
  m.def("moe_down", [](PlanArg p, int64_t d, int64_t i, TensorArg a, ExpertsArg down, TensorArg y, uintptr_t stream) {
    cuda::moe_down(plan(p), d, i, rows(a), experts(down), rows(y), stream);
  });
  m.def("moe_partials", &cuda::moe_partials, "Floats of scratch that moe_down_backward needs.");
  m.def("moe_down_backward", [](PlanArg p, int64_t d, int64_t i, TensorArg grad, ExpertsArg down, TensorArg h,
                                uintptr_t weights, uintptr_t dweights, TensorArg dh, TensorArg scaled, uintptr_t partial,
                                uintptr_t stream) {
    cuda::moe_down_backward(plan(p), d, i, rows(grad), experts(down), rows(h), pointer(weights), pointer(dweights),
                            rows(dh), rows(scaled), pointer(partial), stream);
  });
  m.def("moe_up_backward", [](PlanArg p, int64_t d, int64_t i, TensorArg dh, ExpertsArg gate_up, TensorArg dx,
                              uintptr_t stream) {
    cuda::moe_up_backward(plan(p), d, i, rows(dh), experts(gate_up), rows(dx), stream);
  });
  m.def("moe_weight_grad", [](PlanArg p, int64_t left_width, TensorArg left, int64_t right_width, TensorArg right,
                              bool gather_left, ExpertsArg out, bool accumulate, uintptr_t stream) {
    cuda::moe_weight_grad(plan(p), left_width, rows(left), right_width, rows(right), gather_left, experts(out), accumulate,
                          stream);
  });
  m.def("moe_combine", [](PlanArg p, int64_t tokens, int64_t k, int64_t d, TensorArg y, uintptr_t inverse,
                          uintptr_t weights, TensorArg out, uintptr_t stream) {
    cuda::moe_combine(plan(p), tokens, k, d, rows(y), pointer<int32_t>(inverse), pointer(weights), rows(out), stream);
  });
}
