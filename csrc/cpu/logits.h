// What the passes over a chunk of contrastive logits share.
#pragma once

#include "../tensor.h"
#include "simd.h"

#include <algorithm>
#include <cstdint>
#include <limits>

namespace mmfuse {

constexpr int64_t COLS = 512;  // of a row, taken at a time
constexpr float INF = std::numeric_limits<float>::infinity();

// rows that are worth a thread
inline int64_t row_grain(int64_t n) { return ceil_div(32768, n + 1); }

// a maximum over nothing is -inf, and -inf - -inf would be NaN
MMFUSE_INLINE float reference(float max, float otherwise = 0.0f) { return max > -INF ? max : otherwise; }

// s = scale * u; static, for each file makes clones of its own
template <class T>
MMFUSE_CLONES static void load_logits(const T* u, float scale, float* s, int64_t n) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) s[j] = scale * u[j];
}

// Calls f(begin, end) for the parts of some columns without the positive.
template <class F>
void around(int64_t begin, int64_t end, int64_t positive, const F& f) {
    const int64_t middle = std::clamp(positive, begin, end);
    if (begin < middle) f(begin, middle);
    if (middle + (middle == positive) < end) f(middle + (middle == positive), end);
}

}  // namespace mmfuse
