#include "bindings/bindings.h"
void bind_cross_entropy(py::module_&) {}
