"""The kernels inside other people's libraries. Nothing is imported here: take the module of the library you use."""
