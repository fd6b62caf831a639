// Numbers and checks that need neither torch nor another runtime.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <stdexcept>

namespace mmfuse {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Raises unless it holds, as STD_TORCH_CHECK does.
template <class... Words>
void expect(bool holds, const Words&... words) {
    if (holds) return;
    std::ostringstream all;
    (all << ... << words);
    throw std::runtime_error(all.str());
}

// The product of numbers of at least 1.
inline int64_t product(std::initializer_list<int64_t> sizes, const char* names) {
    int64_t all = 1;
    for (const int64_t n : sizes) {
        expect(n > 0 && n <= INT64_MAX / all, names, ": expected numbers from 1 on of a product below 2^63, got ", n);
        all *= n;
    }
    return all;
}

}  // namespace mmfuse
