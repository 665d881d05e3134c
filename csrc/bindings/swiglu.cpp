#include "bindings/bindings.h"
void bind_swiglu(py::module_&) {}
