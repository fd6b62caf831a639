// Products of rows with a weight that is packed, for any runtime's threads.
//
//     out = a w^T + bias, or added to out      a [rows, k], w [n, k] as panels [n / 64, k, 64]
//
// Of float32, or of bfloat16 with a result of float32: in panels [n / 64, k / 2, 64, 2], and what is denormal counts as 0. A
// tile of rows and of a panel's columns stays in registers. Sums are of at most DEPTH lines of a panel, added up in order. No
// number of threads changes a bit.
#pragma once

#include "../checks.h"
#include "simd.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <utility>

#pragma GCC diagnostic ignored "-Wpsabi"  // of vectors as results: everything is inlined

namespace mmfuse {
namespace {

constexpr int64_t COLUMNS = 64, DEPTH = 512, ROWS_AT_ONCE = 96;  // DEPTH: of a panel, in lines

// of a panel: 64 numbers, or 64 pairs of them
template <class T>
struct alignas(64) PackedLine {
    static constexpr int64_t FEATURES = sizeof(float) / sizeof(T);
    T x[COLUMNS][FEATURES];
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

// s + x w of a line's features, of which there are `count`
template <class F>
MMFUSE_INLINE F multiply_add(F s, const float* x, F w, int64_t count) {
    return s + *x * w;
}
#if defined(__x86_64__) && defined(__linux__)
#define MMFUSE_HAS_PAIRS
typedef uint32_t Pairs __attribute__((vector_size(64)));

MMFUSE_INLINE Lanes<16>::f multiply_add(Lanes<16>::f s, const Bfloat16* x, Lanes<16>::f w, int64_t count) {
    uint32_t pair = 0;
    std::memcpy(&pair, x, count * sizeof(*x));
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(s) : "v"(pair + Pairs{}), "v"(w));
    return s;
}
#endif

// out [R, WIDTH] = bias or out, and a [R, k] times columns of a panel [k, 64]
template <int LANES, int R, int VECTORS, class T>
MMFUSE_INLINE void tile(const T* a, int64_t of_a, const PackedLine<T>* panel, int64_t j, int64_t k, float* out,
                        int64_t of_out, const float* bias, bool adds) {
    using F = typename Lanes<LANES>::f;
    constexpr int64_t FEATURES = PackedLine<T>::FEATURES;
    F s[R][VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v)
            s[r][v] = F{};
    const auto add = [&](int64_t e, int64_t count) {
        F w[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) w[v] = *reinterpret_cast<const F*>(panel[e / FEATURES].x[j + v * LANES]);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) s[r][v] = multiply_add(s[r][v], a + r * of_a + e, w[v], count);
    };
    int64_t e = 0;
    for (; e + FEATURES <= k; e += FEATURES) add(e, FEATURES);
    if (e < k) add(e, k - e);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) {
            F& to = *reinterpret_cast<F*>(out + r * of_out + v * LANES);
            to = (adds ? to : *reinterpret_cast<const F*>(bias + v * LANES)) + s[r][v];
        }
}

template <int LANES, int R, int VECTORS, class T>
MMFUSE_INLINE void tiles(const T* a, int64_t of_a, int64_t rows, const PackedLine<T>* panel, int64_t k, float* out,
                         int64_t of_out, const float* bias, bool adds) {
    for (int64_t j = 0; j < COLUMNS; j += LANES * VECTORS) {
        int64_t i = 0;
        for (; i + R <= rows; i += R)
            tile<LANES, R, VECTORS>(a + i * of_a, of_a, panel, j, k, out + i * of_out + j, of_out, bias + j, adds);
        for (; i + 2 <= rows; i += 2)
            tile<LANES, 2, VECTORS>(a + i * of_a, of_a, panel, j, k, out + i * of_out + j, of_out, bias + j, adds);
        for (; i < rows; ++i)
            tile<LANES, 1, VECTORS>(a + i * of_a, of_a, panel, j, k, out + i * of_out + j, of_out, bias + j, adds);
    }
}

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
__attribute__((target("avx512f,fma"))) void panel_rows(const float* a, int64_t of_a, int64_t rows,
                                                       const PackedLine<float>* panel, int64_t k, float* out,
                                                       int64_t of_out, const float* bias, bool adds) {
    tiles<16, 6, 4>(a, of_a, rows, panel, k, out, of_out, bias, adds);
}
__attribute__((target("avx2,fma"))) void panel_rows(const float* a, int64_t of_a, int64_t rows,
                                                    const PackedLine<float>* panel, int64_t k, float* out, int64_t of_out,
                                                    const float* bias, bool adds) {
    tiles<8, 6, 2>(a, of_a, rows, panel, k, out, of_out, bias, adds);
}
__attribute__((target("default")))
#endif
void panel_rows(const float* a, int64_t of_a, int64_t rows, const PackedLine<float>* panel, int64_t k, float* out,
                int64_t of_out, const float* bias, bool adds) {
    tiles<4, 4, 2>(a, of_a, rows, panel, k, out, of_out, bias, adds);
}

#ifdef MMFUSE_HAS_PAIRS
[[maybe_unused]] __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))) void panel_rows(
    const Bfloat16* a, int64_t of_a, int64_t rows, const PackedLine<Bfloat16>* panel, int64_t k, float* out, int64_t of_out,
    const float* bias, bool adds) {
    tiles<16, 6, 4>(a, of_a, rows, panel, k, out, of_out, bias, adds);
}
#endif

typedef uint32_t Word __attribute__((aligned(2), may_alias));
typedef uint32_t Words __attribute__((vector_size(64), aligned(2), may_alias));

#if __has_builtin(__builtin_shufflevector)
// of two rows, swaps the words that lie on the other's side of multiples of D
template <int D, int... LANE>
MMFUSE_INLINE void swap(Words& x, Words& y, std::integer_sequence<int, LANE...>) {
    const Words of_x = __builtin_shufflevector(x, y, (LANE & D ? 16 + LANE - D : LANE)...);
    y = __builtin_shufflevector(x, y, (LANE & D ? 16 + LANE : LANE + D)...);
    x = of_x;
}

template <int D>
MMFUSE_INLINE void swap_all(Words (&x)[16]) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i)
        if (!(i & D)) swap<D>(x[i], x[i + D], std::make_integer_sequence<int, 16>());
}

MMFUSE_INLINE void transpose(Words (&x)[16]) {
    swap_all<8>(x);
    swap_all<4>(x);
    swap_all<2>(x);
    swap_all<1>(x);
}
#else  // g++ 11
MMFUSE_INLINE void transpose(Words (&x)[16]) {
    for (int i = 0; i < 16; ++i)
        for (int j = 0; j < i; ++j) {
            const uint32_t word = x[i][j];
            x[i][j] = x[j][i];
            x[j][i] = word;
        }
}
#endif

// to [k, rows], lines `of_to` apart, of rows [rows, k]; a word is a number, or two neighbours of a row
template <class T>
MMFUSE_INLINE void transpose(const T* from, int64_t of_row, int64_t of_feature, int64_t rows, int64_t k, T* to, int64_t of_to) {
    constexpr int64_t FEATURES = PackedLine<T>::FEATURES, SQUARE = 16;
    const int64_t whole = rows / SQUARE * SQUARE, deep = of_feature == 1 ? k / (SQUARE * FEATURES) * (SQUARE * FEATURES) : 0;
    for (int64_t j = 0; j < whole; j += SQUARE)
        for (int64_t e = 0; e < deep; e += SQUARE * FEATURES) {
            Words x[SQUARE];
#pragma GCC unroll 16
            for (int i = 0; i < SQUARE; ++i) x[i] = *reinterpret_cast<const Words*>(from + (j + i) * of_row + e);
            transpose(x);
#pragma GCC unroll 16
            for (int i = 0; i < SQUARE; ++i) *reinterpret_cast<Words*>(to + (e / FEATURES + i) * of_to + j * FEATURES) = x[i];
        }
    int64_t e = 0;
    if constexpr (FEATURES == 2)  // of columns that lie side by side
        for (; of_row == 1 && e + 2 <= k; e += 2) {
            const T *even = from + e * of_feature, *odd = even + of_feature;
            Word* words = reinterpret_cast<Word*>(to + e / 2 * of_to);
#pragma omp simd
            for (int64_t j = 0; j < rows; ++j) words[j] = even[j].bits | uint32_t(odd[j].bits) << 16;
        }
    for (; e < k; ++e)
        for (int64_t j = e < deep ? whole : 0; j < rows; ++j)
            to[e / FEATURES * of_to + j * FEATURES + e % FEATURES] = from[j * of_row + e * of_feature];
}

MMFUSE_CLONES
void transposed(const float* from, int64_t of_row, int64_t of_feature, int64_t rows, int64_t k, float* to, int64_t of_to) {
    transpose(from, of_row, of_feature, rows, k, to, of_to);
}

[[maybe_unused]] MMFUSE_CLONES
void transposed(const Bfloat16* from, int64_t of_row, int64_t of_feature, int64_t rows, int64_t k, Bfloat16* to,
                int64_t of_to) {
    transpose(from, of_row, of_feature, rows, k, to, of_to);
}

// A panel of `width` rows of a weight of k features; rows and features are `of_*` apart.
template <class T>
void pack(const T* w, int64_t of_row, int64_t of_feature, int64_t width, int64_t k, PackedLine<T>* panel) {
    constexpr int64_t FEATURES = PackedLine<T>::FEATURES;
    if (width < COLUMNS || k % FEATURES) std::fill_n(panel, ceil_div(k, FEATURES), PackedLine<T>{});
    transposed(w, of_row, of_feature, width, k, panel[0].x[0], COLUMNS * FEATURES);
}

// The same of a panel of which only `width` columns are meant.
template <class T>
void rows_of_panel(const T* a, int64_t of_a, int64_t rows, const PackedLine<T>* panel, int64_t k, float* out,
                   int64_t of_out, int64_t width, const float* bias, bool adds) {
    if (width == COLUMNS) return panel_rows(a, of_a, rows, panel, k, out, of_out, bias, adds);
    float part[ROWS_AT_ONCE][COLUMNS];
    for (int64_t i = 0; i < rows; i += ROWS_AT_ONCE) {
        const int64_t some = std::min(ROWS_AT_ONCE, rows - i);
        for (int64_t r = 0; adds && r < some; ++r) std::copy_n(out + (i + r) * of_out, width, part[r]);
        panel_rows(a + i * of_a, of_a, some, panel, k, part[0], COLUMNS, bias, adds);
        for (int64_t r = 0; r < some; ++r) std::copy_n(part[r], width, out + (i + r) * of_out);
    }
}

// A weight [n, k] with its bias.
struct Packed {
    int64_t n, k, panels;
    std::unique_ptr<PackedLine<float>[]> lines;  // [panels, 1 + k]: the bias before the weight

    template <class Parallel>
    Packed(const float* w, const float* bias, int64_t n, int64_t k, const Parallel& parallel)
        : n(n), k(k), panels(ceil_div(n, COLUMNS)), lines(new PackedLine<float>[panels * (1 + k)]()) {
        parallel(0, panels, 1, [&](int64_t begin, int64_t end) {
            for (int64_t p = begin; p < end; ++p) {
                PackedLine<float>* to = lines.get() + p * (1 + k);
                const int64_t first = p * COLUMNS, width = std::min(COLUMNS, n - first);
                if (bias) std::copy_n(bias + first, width, to[0].x[0]);
                pack(w + first * k, k, 1, width, k, to + 1);
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
            for (int64_t t = begin; t < end; ++t) {
                const int64_t p = t % panels, part = t / panels % parts, h = t / panels / parts;
                const int64_t first = part * rows / parts, count = (part + 1) * rows / parts - first;
                const PackedLine<float>* panel = lines.get() + p * (1 + k);
                const float* from = a + h * of_a + first * row_a;
                float* to = out + h * of_out + first * row_out + p * COLUMNS;
                for (int64_t e = 0; e < std::max<int64_t>(k, 1); e += DEPTH)
                    rows_of_panel(from + e, row_a, count, panel + 1 + e, std::min(DEPTH, k - e), to, row_out,
                                  std::min(COLUMNS, n - p * COLUMNS), panel[0].x[0], e > 0);
            }
        });
    }
};

}  // namespace
}  // namespace mmfuse
