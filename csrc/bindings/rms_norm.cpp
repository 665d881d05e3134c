#include "bindings/bindings.h"
#include "cpu/rms_norm.h"

using namespace qwen3;

void bind_rms_norm(py::module_& m) {
  m.def("rms_norm", [](int64_t n, int64_t h, float eps, TensorArg x, TensorArg residual, TensorArg weight, TensorArg y,
                       TensorArg sum, uintptr_t rstd) {
    const RmsNorm args{n, h, eps, rows(x), rows(residual), rows(weight), rows(y), rows(sum), pointer(rstd)};
    py::gil_scoped_release release;
    QWEN3_CALL(rms_norm, args);
  });
  m.def("rms_norm_backward", [](int64_t n, int64_t h, TensorArg dy, TensorArg dsum, TensorArg sum, TensorArg weight,
                                uintptr_t rstd, TensorArg dx, uintptr_t dweight) {
    const RmsNormBackward args{n, h, rows(dy), rows(dsum), rows(sum), rows(weight), pointer(rstd), rows(dx), pointer(dweight)};
    py::gil_scoped_release release;
    QWEN3_CALL(rms_norm_backward, args);
  });
}
