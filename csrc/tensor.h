// Access to the memory of an operator's arguments.
#pragma once

#include <cstdint>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

namespace mmfuse {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The elements of `t`, which must be contiguous, on the device of `u`, of this type and this many.
template <class T>
T* data(const Tensor& t, const char* name, const Tensor& u, ScalarType dtype, int64_t numel) {
    STD_TORCH_CHECK(t.is_contiguous() && t.is_cuda() == u.is_cuda() && t.get_device_index() == u.get_device_index(),
                    name, ": expected a contiguous tensor on the device of u");
    STD_TORCH_CHECK(t.scalar_type() == dtype && t.numel() == numel, name, ": expected ", numel, " elements of type ",
                    int(dtype), ", got ", t.numel(), " of type ", int(t.scalar_type()));
    return static_cast<T*>(t.data_ptr());
}

inline float* floats(const Tensor& t, const char* name, const Tensor& u, int64_t numel) {
    return data<float>(t, name, u, ScalarType::Float, numel);
}

// null for an empty tensor: the argument is not wanted
template <class T>
T* optional_data(const Tensor& t, const char* name, const Tensor& u, ScalarType dtype, int64_t numel) {
    return t.numel() == 0 ? nullptr : data<T>(t, name, u, dtype, numel);
}

}  // namespace mmfuse
