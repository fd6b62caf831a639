// Access to the memory of an operator's arguments.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>

#include "checks.h"

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

namespace mmfuse {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Raises unless `t` has these sizes; FREE is any.
constexpr int64_t FREE = -1;
inline void check_sizes(const Tensor& t, const char* name, std::initializer_list<int64_t> sizes) {
    bool fits = t.dim() == int64_t(sizes.size());
    for (int64_t d = 0; fits && d < t.dim(); ++d) fits = sizes.begin()[d] == FREE || sizes.begin()[d] == t.size(d);
    if (fits) return;
    std::string expected, got;
    for (const int64_t n : sizes) expected += (expected.empty() ? "" : ", ") + (n == FREE ? "any" : std::to_string(n));
    for (int64_t d = 0; d < t.dim(); ++d) got += (d ? ", " : "") + std::to_string(t.size(d));
    STD_TORCH_CHECK(false, name, ": expected sizes [", expected, "], got [", got, "]");
}

// The column of row 0's positive, near the columns of a block [c, n] where none of its rows has one.
inline int64_t near(int64_t diagonal, int64_t c, int64_t n) { return diagonal < -c ? -c : diagonal > n ? n : diagonal; }

// first <= index < first + count, all of which are numbers of 64 bits
inline void check_first(int64_t first, const char* name, int64_t count) {
    STD_TORCH_CHECK(first >= 0 && first <= INT64_MAX - count, name, ": expected an index, got ", first);
}

inline bool same_device(const Tensor& t, const Tensor& u) {
    return t.is_cuda() == u.is_cuda() && t.get_device_index() == u.get_device_index();
}

// The elements of `t`, which must be contiguous, on the device of `u`, of this type and this many.
template <class T>
T* data(const Tensor& t, const char* name, const Tensor& u, ScalarType dtype, int64_t numel) {
    STD_TORCH_CHECK(t.is_contiguous() && same_device(t, u), name, ": expected a contiguous tensor on the device of u");
    STD_TORCH_CHECK(t.scalar_type() == dtype && t.numel() == numel, name, ": expected ", numel, " elements of type ",
                    int(dtype), ", got ", t.numel(), " of type ", int(t.scalar_type()));
    STD_TORCH_CHECK(numel == 0 || t.data_ptr() != nullptr, name, ": expected memory for ", numel, " elements, got none");
    return static_cast<T*>(t.data_ptr());
}

inline float* floats(const Tensor& t, const char* name, const Tensor& u, int64_t numel) {
    return data<float>(t, name, u, ScalarType::Float, numel);
}

// null for an empty tensor: the argument is not wanted
template <class T>
T* optional_data(const Tensor& t, const char* name, const Tensor& u, ScalarType dtype, int64_t numel) {
    STD_TORCH_CHECK(same_device(t, u), name, ": expected the device of u");
    return t.numel() == 0 ? nullptr : data<T>(t, name, u, dtype, numel);
}

}  // namespace mmfuse
