#include "bindings/bindings.h"
#include "cpu/qk_norm_rope.h"

using namespace qwen3;

void bind_qk_norm_rope(py::module_& m) {
  m.def("norm_rope", [](int64_t n, int64_t count, int64_t d, int64_t r, float eps, HeadsArg x, TensorArg weight,
                        uintptr_t cos, uintptr_t sin, HeadsArg out) {
    const NormRope args{n, count, d, r, eps, heads(x), rows(weight), pointer(cos), pointer(sin), heads(out)};
    py::gil_scoped_release release;
    QWEN3_CALL(norm_rope, args);
  });
  m.def("norm_rope_backward", [](int64_t n, int64_t count, int64_t d, int64_t r, float eps, HeadsArg dout, HeadsArg x,
                                 TensorArg weight, uintptr_t cos, uintptr_t sin, HeadsArg dx, uintptr_t dweight) {
    const NormRopeBackward args{n, count, d, r, eps, heads(dout), heads(x), rows(weight), pointer(cos),
                                pointer(sin), heads(dx), pointer(dweight)};
    py::gil_scoped_release release;
    QWEN3_CALL(norm_rope_backward, args);
  });
}
