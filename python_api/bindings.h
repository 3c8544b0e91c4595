// The parts of gft_kernels._C, one per file, and how an address becomes a pointer.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace gft::python_api {

using Address = std::uintptr_t;  // tensor.data_ptr(); 0 says "absent"

template <class T>
T* to(Address address) {
    return reinterpret_cast<T*>(address);
}

void bind_formulas(pybind11::module_& m);  // formulas.cpp
#if defined(GFT_WITH_CUDA)
void bind_cuda(pybind11::module_& m);  // cuda.cpp
#endif

}  // namespace gft::python_api
