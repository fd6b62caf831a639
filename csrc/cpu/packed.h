// Products of float32 rows with a weight that was packed before, for any runtime's threads.
//
//     out = a w^T + bias      a [rows, k], w [n, k] as panels [n / 64, k, 64]
//
// A tile of rows and of a panel's columns stays in registers. Sums are of at most DEPTH numbers, added up in order. No number
// of threads changes a bit.
#pragma once

#include "../checks.h"
#include "simd.h"

#include <algorithm>
#include <memory>

namespace mmfuse {
namespace {

constexpr int64_t COLUMNS = 64, DEPTH = 512, ROWS_AT_ONCE = 96;

struct alignas(64) PackedLine {
    float x[COLUMNS];
};

template <int LANES>
struct Lanes;
template <>
struct Lanes<4> {
    typedef float f __attribute__((vector_size(16), aligned(4), may_alias));
};
template <>
struct Lanes<8> {
    typedef float f __attribute__((vector_size(32), aligned(4), may_alias));
};
template <>
struct Lanes<16> {
    typedef float f __attribute__((vector_size(64), aligned(4), may_alias));
};

// out [R, WIDTH] = or += a [R, k] times columns of a panel [k, 64]
template <int LANES, int R, int VECTORS>
MMFUSE_INLINE void tile(const float* a, int64_t of_a, const float* panel, int64_t k, float* out, int64_t of_out,
                        const float* bias, bool adds) {
    using F = typename Lanes<LANES>::f;
    F s[R][VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v)
            s[r][v] = adds ? *reinterpret_cast<const F*>(out + r * of_out + v * LANES) : *reinterpret_cast<const F*>(bias + v * LANES);
    for (int64_t e = 0; e < k; ++e, panel += COLUMNS) {
        F w[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) w[v] = *reinterpret_cast<const F*>(panel + v * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const float x = a[r * of_a + e];
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) s[r][v] += x * w[v];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) *reinterpret_cast<F*>(out + r * of_out + v * LANES) = s[r][v];
}

template <int LANES, int R, int VECTORS>
MMFUSE_INLINE void tiles(const float* a, int64_t of_a, int64_t rows, const float* panel, int64_t k, float* out,
                         int64_t of_out, const float* bias, bool adds) {
    for (int64_t j = 0; j < COLUMNS; j += LANES * VECTORS) {
        int64_t i = 0;
        for (; i + R <= rows; i += R)
            tile<LANES, R, VECTORS>(a + i * of_a, of_a, panel + j, k, out + i * of_out + j, of_out, bias + j, adds);
        for (; i < rows; ++i)
            tile<LANES, 1, VECTORS>(a + i * of_a, of_a, panel + j, k, out + i * of_out + j, of_out, bias + j, adds);
    }
}

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
__attribute__((target("avx512f,fma"))) void panel_rows(const float* a, int64_t of_a, int64_t rows, const float* panel,
                                                       int64_t k, float* out, int64_t of_out, const float* bias, bool adds) {
    tiles<16, 6, 4>(a, of_a, rows, panel, k, out, of_out, bias, adds);
}
__attribute__((target("avx2,fma"))) void panel_rows(const float* a, int64_t of_a, int64_t rows, const float* panel,
                                                    int64_t k, float* out, int64_t of_out, const float* bias, bool adds) {
    tiles<8, 6, 2>(a, of_a, rows, panel, k, out, of_out, bias, adds);
}
__attribute__((target("default")))
#endif
void panel_rows(const float* a, int64_t of_a, int64_t rows, const float* panel, int64_t k, float* out, int64_t of_out,
                const float* bias, bool adds) {
    tiles<4, 4, 2>(a, of_a, rows, panel, k, out, of_out, bias, adds);
}

// A weight [n, k] with its bias.
struct Packed {
    int64_t n, k, panels;
    std::unique_ptr<PackedLine[]> lines;  // [panels, 1 + k]: the bias before the weight

    template <class Parallel>
    Packed(const float* w, const float* bias, int64_t n, int64_t k, const Parallel& parallel)
        : n(n), k(k), panels(ceil_div(n, COLUMNS)), lines(new PackedLine[panels * (1 + k)]) {
        parallel(0, panels, 1, [&](int64_t begin, int64_t end) {
            for (int64_t p = begin; p < end; ++p) {
                PackedLine* to = lines.get() + p * (1 + k);
                for (int64_t j = 0; j < COLUMNS; ++j) {
                    const int64_t row = p * COLUMNS + j;
                    to[0].x[j] = bias && row < n ? bias[row] : 0.0f;
                    for (int64_t e = 0; e < k; ++e) to[1 + e].x[j] = row < n ? w[row * k + e] : 0.0f;
                }
            }
        });
    }

    // out [heads, rows, n] of a [heads, rows, k], whose heads and rows are `of_*` apart
    template <class Parallel>
    void multiply(float* out, int64_t of_out, int64_t row_out, const float* a, int64_t of_a, int64_t row_a, int64_t heads,
                  int64_t rows, const Parallel& parallel) const {
        const int64_t parts = ceil_div(rows, ROWS_AT_ONCE), all = heads * parts * panels;
        const int64_t grain = ceil_div(1 << 19, (std::min(rows, ROWS_AT_ONCE) + 1) * (k + 1) * COLUMNS);
        parallel(0, all, grain, [&](int64_t begin, int64_t end) {
            PackedLine edge[ROWS_AT_ONCE];
            for (int64_t t = begin; t < end; ++t) {
                const int64_t p = t % panels, part = t / panels % parts, h = t / panels / parts;
                const int64_t first = part * rows / parts, count = (part + 1) * rows / parts - first;
                const PackedLine* panel = lines.get() + p * (1 + k);
                const float* from = a + h * of_a + first * row_a;
                float* to = out + h * of_out + first * row_out + p * COLUMNS;
                const int64_t width = std::min(COLUMNS, n - p * COLUMNS);
                const bool whole = width == COLUMNS;
                for (int64_t e = 0; e < std::max<int64_t>(k, 1); e += DEPTH)
                    panel_rows(from + e, row_a, count, panel[1 + e].x, std::min(DEPTH, k - e), whole ? to : edge[0].x,
                               whole ? row_out : COLUMNS, panel[0].x, e > 0);
                for (int64_t i = 0; !whole && i < count; ++i) std::copy_n(edge[i].x, width, to + i * row_out);
            }
        });
    }
};

}  // namespace
}  // namespace mmfuse
