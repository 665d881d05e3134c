#include "bindings/bindings.h"
#include "cpu/qk_norm_rope.h"

using namespace qwen3;

namespace {

using HeadsArg = std::pair<TensorArg, int64_t>;  // tokens, stride between heads in elements
Heads heads_of(const HeadsArg& t) { return {rows(t.first), t.second}; }

}  // namespace

void bind_qk_norm_rope(py::module_& m) {
  m.def("norm_rope", [](int64_t n, int64_t heads, int64_t d, int64_t r, float eps, HeadsArg x, TensorArg weight,
                        uintptr_t cos, uintptr_t sin, HeadsArg out) {
    const NormRope args{n, heads, d, r, eps, heads_of(x), rows(weight), pointer(cos), pointer(sin), heads_of(out)};
    py::gil_scoped_release release;
    QWEN3_CALL(norm_rope, args);
  });
  m.def("norm_rope_backward", [](int64_t n, int64_t heads, int64_t d, int64_t r, float eps, HeadsArg dout, HeadsArg x,
                                 TensorArg weight, uintptr_t cos, uintptr_t sin, HeadsArg dx, uintptr_t dweight) {
    const NormRopeBackward args{n, heads, d, r, eps, heads_of(dout), heads_of(x), rows(weight), pointer(cos),
                                pointer(sin), heads_of(dx), pointer(dweight)};
    py::gil_scoped_release release;
    QWEN3_CALL(norm_rope_backward, args);
  });
}
