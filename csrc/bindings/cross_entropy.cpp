#include "bindings/bindings.h"
#include "cpu/cross_entropy.h"

using namespace qwen3;

namespace {

void check_labels(const int64_t* labels, int64_t n, int64_t v, int64_t ignore_index) {
  for (int64_t i = 0; i < n; ++i) {
    if (labels[i] == ignore_index || (labels[i] >= 0 && labels[i] < v)) continue;
    throw py::index_error("cross_entropy: labels has " + std::to_string(labels[i]) + " at " + std::to_string(i) +
                          "; expected a class from 0 to " + std::to_string(v - 1) + ", or ignore_index, " +
                          std::to_string(ignore_index));
  }
}

}  // namespace

void bind_cross_entropy(py::module_& m) {
  m.def("cross_entropy", [](int64_t n, int64_t v, TensorArg logits, uintptr_t labels, int64_t ignore_index,
                            uintptr_t nll, uintptr_t lse) {
    const CrossEntropy args{n, v, rows(logits), pointer<int64_t>(labels), ignore_index, pointer(nll), pointer(lse)};
    check_labels(args.labels, n, v, ignore_index);
    py::gil_scoped_release release;
    QWEN3_CALL(cross_entropy, args);
  });
  m.def("cross_entropy_backward", [](int64_t n, int64_t v, uintptr_t dnll, uintptr_t dlse, TensorArg logits,
                                     uintptr_t labels, int64_t ignore_index, uintptr_t lse, TensorArg dlogits) {
    const CrossEntropyBackward args{n, v, pointer(dnll), pointer(dlse), rows(logits), pointer<int64_t>(labels),
                                    ignore_index, pointer(lse), rows(dlogits)};
    check_labels(args.labels, n, v, ignore_index);
    py::gil_scoped_release release;
    QWEN3_CALL(cross_entropy_backward, args);
  });
}
