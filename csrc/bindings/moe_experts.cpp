#include "bindings/bindings.h"
#include "cpu/moe_experts.h"

using namespace qwen3;

void bind_moe_experts(py::module_& m) {
  m.def("moe_rows", [](int64_t experts, int64_t n, int64_t k, int64_t most, uintptr_t offsets, uintptr_t source, TensorArg a,
                       TensorArg weight, TensorArg out) {
    const MoeRows args{experts, n, k, most, pointer<int32_t>(offsets), pointer<int32_t>(source), rows(a), rows(weight),
                       rows(out)};
    py::gil_scoped_release release;
    QWEN3_CALL(moe_rows, args);
  });
}
