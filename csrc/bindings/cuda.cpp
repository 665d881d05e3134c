#include "bindings/bindings.h"
#include "cuda/attention.h"
#include "cuda/kernels.h"
#include "cuda/linear_cross_entropy.h"

using namespace qwen3;

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
  m.def("attention_backward", [](int64_t sequences, int64_t length, int64_t q_heads, int64_t k_heads, uintptr_t cu_seqlens,
                                 bool causal, float scale, HeadsArg q, HeadsArg k, HeadsArg v, HeadsArg dout, uintptr_t out,
                                 uintptr_t lse, uintptr_t dq, uintptr_t dk, uintptr_t dv, uintptr_t rows, uintptr_t sums,
                                 uintptr_t counters, uintptr_t stream) {
    const int64_t tiles = cuda::attention_backward_tiles(cu_seqlens != 0, sequences, length) * q_heads;
    cuda::attention_backward({sequences, length, q_heads, k_heads, pointer<int32_t>(cu_seqlens), causal, scale, heads(q), heads(k),
                              heads(v), heads(dout), pointer<void>(out), pointer(lse), pointer<void>(dq), pointer<void>(dk),
                              pointer<void>(dv), pointer(rows), pointer(rows) + tiles * 128, pointer(sums),
                              pointer<int32_t>(counters), pointer<int32_t>(counters) + 2 * tiles}, stream);
  });
  m.def("linear_cross_entropy_scratch", &cuda::linear_cross_entropy_scratch, "Floats of scratch that a chunk needs.");
  m.def("linear_cross_entropy", [](int64_t n, int64_t h, int64_t v, TensorArg hidden, TensorArg head, uintptr_t labels,
                                   int64_t ignore_index, float inverse_temperature, float z_loss, uintptr_t weight,
                                   uintptr_t nll, uintptr_t lse, uintptr_t entropy, TensorArg unnormalised,
                                   TensorArg scaled_hidden, uintptr_t row_scale, uintptr_t scratch, uintptr_t stream) {
    cuda::linear_cross_entropy({n, h, v, rows(hidden), rows(head), pointer<int64_t>(labels), ignore_index,
                                inverse_temperature, z_loss, pointer(weight), pointer(nll), pointer(lse), pointer(entropy),
                                rows(unnormalised), rows(scaled_hidden), pointer(row_scale), pointer(scratch)}, stream);
  });
}
