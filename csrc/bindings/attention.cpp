#include "cpu/attention.h"

#include "bindings/bindings.h"

using namespace qwen3;

namespace {

using ShapeArg = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, uintptr_t, uintptr_t, bool, float>;
AttentionShape shape(const ShapeArg& s) {
  const auto& [sequences, q_len, k_len, q_heads, k_heads, width, cu_seqlens, q_start, causal, scale] = s;
  return {sequences, q_len, k_len, q_heads, k_heads, width, pointer<int32_t>(cu_seqlens), pointer<int32_t>(q_start), causal,
          scale};
}

}  // namespace

void bind_attention(py::module_& m) {
  m.def("attention", [](ShapeArg s, HeadsArg q, HeadsArg k, HeadsArg v, HeadsArg out, uintptr_t lse) {
    const Attention args{shape(s), heads(q), heads(k), heads(v), heads(out), pointer(lse)};
    py::gil_scoped_release release;
    QWEN3_CALL(attention, args);
  });
  m.def("attention_backward", [](ShapeArg s, HeadsArg dout, HeadsArg q, HeadsArg k, HeadsArg v, HeadsArg dq,
                                 HeadsArg dk, HeadsArg dv) {
    const AttentionBackward args{shape(s), heads(dout), heads(q), heads(k), heads(v), heads(dq), heads(dk), heads(dv)};
    py::gil_scoped_release release;
    QWEN3_CALL(attention_backward, args);
  });
}
