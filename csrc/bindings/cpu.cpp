#include "bindings/bindings.h"
#include "cpu/isa.h"

#define QWEN3_BIND(op) void bind_##op(py::module_&)
QWEN3_BIND(rms_norm);
QWEN3_BIND(qk_norm_rope);
QWEN3_BIND(swiglu);
QWEN3_BIND(cross_entropy);
QWEN3_BIND(attention);
QWEN3_BIND(moe_experts);

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels on raw pointers; use the ops of qwen3_kernels instead.";
  m.def("isa", [] { return qwen3::isa_name(qwen3::isa()); }, "Instruction set in use: scalar, avx2 or avx512.");
  bind_rms_norm(m);
  bind_qk_norm_rope(m);
  bind_swiglu(m);
  bind_cross_entropy(m);
  bind_attention(m);
  bind_moe_experts(m);
}
