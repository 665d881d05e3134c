#include "bindings/bindings.h"
void bind_qk_norm_rope(py::module_&) {}
