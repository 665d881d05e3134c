#include "bindings/bindings.h"
#include "cpu/swiglu.h"

using namespace qwen3;

void bind_swiglu(py::module_& m) {
  m.def("swiglu", [](int64_t n, int64_t width, TensorArg gate, TensorArg up, TensorArg y) {
    const Swiglu args{n, width, rows(gate), rows(up), rows(y)};
    py::gil_scoped_release release;
    QWEN3_CALL(swiglu, args);
  });
  m.def("swiglu_backward", [](int64_t n, int64_t width, TensorArg dy, TensorArg gate, TensorArg up, TensorArg dgate,
                              TensorArg dup) {
    const SwigluBackward args{n, width, rows(dy), rows(gate), rows(up), rows(dgate), rows(dup)};
    py::gil_scoped_release release;
    QWEN3_CALL(swiglu_backward, args);
  });
}
