// Nearest code on the CPU, for any runtime's threads: the products, the running maxima and their certificate in one pass, no matrix of scores.
//
// Score of a row z and a code k: s_k = a_k <z, w_k> + b_k. In float32 each of 16 slots (codes k mod 16) keeps its
// largest score, the panel that it came from, and the largest score of any other panel. Codes that float32 cannot tell
// from the largest are scored again in float64, so the result is float64's argmax.

#pragma once

#include "../checks.h"
#include "simd.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

namespace mmfuse {
namespace {

constexpr int64_t SLOTS = 16, DEPTH = 4, PANEL = SLOTS * DEPTH;  // codes that share a pass over the rows
constexpr int64_t ROWS = 192;  // of z, in the second-level cache beside their slots
constexpr float INF = std::numeric_limits<float>::infinity();

struct alignas(64) Line {
    float x[SLOTS];
};

struct alignas(64) Slots {  // of one row
    float best[SLOTS], second[SLOTS];
    int32_t panel[SLOTS];
};

// ---------------------------------------------------------------------------------------------------------------
// float32

template <int LANES>
struct Vector;
template <>
struct Vector<4> {
    typedef float f __attribute__((vector_size(16), aligned(16)));
    typedef int32_t i __attribute__((vector_size(16), aligned(16)));
};
template <>
struct Vector<8> {
    typedef float f __attribute__((vector_size(32), aligned(32)));
    typedef int32_t i __attribute__((vector_size(32), aligned(32)));
};
template <>
struct Vector<16> {
    typedef float f __attribute__((vector_size(64), aligned(64)));
    typedef int32_t i __attribute__((vector_size(64), aligned(64)));
};

// one panel [1 + d, PANEL], biases first, against the rows of a block; R rows at a time stay in registers
template <int LANES, int R>
MMFUSE_INLINE void score_panel_of(const float* z, int64_t rows, int64_t d, const float* panel, int32_t number,
                                  Slots* slots) {
    using F = typename Vector<LANES>::f;
    using I = typename Vector<LANES>::i;
    for (int64_t i = 0; i < rows; i += R) {
        for (int64_t lane = 0; lane < SLOTS; lane += LANES) {
            F s[R][DEPTH];
#pragma GCC unroll 4
            for (int v = 0; v < DEPTH; ++v) {
                const F bias = *reinterpret_cast<const F*>(panel + v * SLOTS + lane);
#pragma GCC unroll 6
                for (int r = 0; r < R; ++r) s[r][v] = bias;
            }
            const float* w = panel + PANEL + lane;
            for (int64_t k = 0; k < d; ++k, w += PANEL) {
                F w_k[DEPTH];
#pragma GCC unroll 4
                for (int v = 0; v < DEPTH; ++v) w_k[v] = *reinterpret_cast<const F*>(w + v * SLOTS);
#pragma GCC unroll 6
                for (int r = 0; r < R; ++r) {
                    const float x = z[(i + r) * d + k];
#pragma GCC unroll 4
                    for (int v = 0; v < DEPTH; ++v) s[r][v] += x * w_k[v];
                }
            }
#pragma GCC unroll 6
            for (int r = 0; r < R; ++r) {
                Slots& row = slots[i + r];
                F& best = *reinterpret_cast<F*>(row.best + lane);
                F& second = *reinterpret_cast<F*>(row.second + lane);
                I& at = *reinterpret_cast<I*>(row.panel + lane);
                const F a = s[r][0] > s[r][1] ? s[r][0] : s[r][1], b = s[r][2] > s[r][3] ? s[r][2] : s[r][3];
                const F top = a > b ? a : b, less = top < best ? top : best;
                second = less > second ? less : second;
                at = top > best ? I{} + number : at;
                best = top > best ? top : best;
            }
        }
    }
}

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define MMFUSE_TARGET(x) __attribute__((target(x)))
MMFUSE_TARGET("avx512f,fma")
void score_panel(const float* z, int64_t rows, int64_t d, const float* panel, int32_t number, Slots* slots) {
    score_panel_of<16, 6>(z, rows, d, panel, number, slots);
}
MMFUSE_TARGET("avx2,fma")
void score_panel(const float* z, int64_t rows, int64_t d, const float* panel, int32_t number, Slots* slots) {
    score_panel_of<8, 3>(z, rows, d, panel, number, slots);
}
#else
#define MMFUSE_TARGET(x)
#endif
MMFUSE_TARGET("default")
void score_panel(const float* z, int64_t rows, int64_t d, const float* panel, int32_t number, Slots* slots) {
    score_panel_of<4, 2>(z, rows, d, panel, number, slots);
}

// the same for one row, every score; the order of the sum is that of `score_panel`
MMFUSE_CLONES
void score_row(const float* z, int64_t d, const float* panel, float* s) {
    std::copy_n(panel, PANEL, s);
    for (int64_t k = 0; k < d; ++k) {
        const float x = z[k], *w = panel + PANEL * (1 + k);
#pragma omp simd
        for (int64_t j = 0; j < PANEL; ++j) s[j] += x * w[j];
    }
}

// ---------------------------------------------------------------------------------------------------------------
// float64

MMFUSE_CLONES
double dot(const float* x, const float* y, int64_t d) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < d; ++k) sum += double(x[k]) * double(y[k]);
    return sum;
}

// one panel [d, PANEL] of K codes from w [K, d], and the largest |a_k w_k|^2
MMFUSE_CLONES
double pack_panel(const float* w, const double* scale, int64_t K, int64_t d, float* out) {
    double norm2[PANEL] = {};
    constexpr int64_t LINE = 16;  // of a code at a time: rows of a power of two share the cache's sets
    for (int64_t first = 0; first < d; first += LINE) {
        const int64_t count = std::min(LINE, d - first);
        float* part = out + first * PANEL;
        for (int64_t j = 0; j < PANEL; ++j)
            for (int64_t i = 0; i < count; ++i) part[i * PANEL + j] = j < K ? w[j * d + first + i] : 0.0f;
        for (int64_t i = 0; i < count; ++i) {
            float* out_i = part + i * PANEL;
            if (scale)
                for (int64_t j = 0; j < K; ++j) out_i[j] = float(scale[j] * out_i[j]);
#pragma omp simd
            for (int64_t j = 0; j < PANEL; ++j) norm2[j] += double(out_i[j]) * double(out_i[j]);
        }
    }
    double largest = 0;
    for (int64_t j = 0; j < PANEL; ++j) largest = largest >= norm2[j] || largest != largest ? largest : norm2[j];
    return largest;
}

// the larger; a NaN stays
MMFUSE_INLINE double larger(double a, double b) { return a >= b || a != a ? a : b; }

struct Codes {
    const float* w;       // [K, d]
    const double* scale;  // [K], or null: 1
    const double* bias;   // [K], or null: 0
    int64_t K, d, panels;
    std::unique_ptr<Line[]> packed;  // [panels, 1 + d, PANEL]
    std::vector<double> norm2;     // [panels] the largest |a_k w_k|^2
    std::vector<double> offset;    // [panels] the largest |b_k|
    double largest_norm, largest_offset;

    Codes(const float* w, const double* scale, const double* bias, int64_t K, int64_t d)
        : w(w), scale(scale), bias(bias), K(K), d(d), panels(ceil_div(K, PANEL)), largest_norm(0), largest_offset(0) {}

    const float* panel(int64_t p) const { return packed[0].x + p * (1 + d) * PANEL; }
    double scale_of(int64_t k) const { return scale ? scale[k] : 1.0; }
    double bias_of(int64_t k) const { return bias ? bias[k] : 0.0; }
    double score(const float* z, int64_t k) const { return scale_of(k) * dot(z, w + k * d, d) + bias_of(k); }

    template <class Parallel>
    void pack(const Parallel& parallel) {
        packed.reset(new Line[panels * (1 + d) * DEPTH]);  // without zeros, which would be written in vain
        norm2.resize(panels), offset.resize(panels);
        parallel(0, panels, 16, [&](int64_t begin, int64_t end) {
            for (int64_t p = begin; p < end; ++p) {
                float* out = packed[0].x + p * (1 + d) * PANEL;
                const int64_t first = p * PANEL, height = std::min(PANEL, K - first);
                norm2[p] = pack_panel(w + first * d, scale ? scale + first : nullptr, height, d, out + PANEL);
                for (int64_t j = 0; j < PANEL; ++j) {
                    out[j] = j < height ? float(bias_of(first + j)) : -INF;
                    if (j < height) offset[p] = larger(offset[p], std::abs(bias_of(first + j)));
                }
            }
        });
        double n = 0, b = 0;
        for (int64_t p = 0; p < panels; ++p) n = larger(n, norm2[p]), b = larger(b, offset[p]);
        largest_norm = std::sqrt(n), largest_offset = b;
    }

    // the first of the candidates that float64 cannot tell from the largest; a NaN is the largest, as in torch
    int64_t best_of(const float* z, const std::vector<int64_t>& candidates, std::vector<double>& s, double tie) const {
        s.resize(candidates.size());
        double m = -INF;
        for (size_t c = 0; c < s.size(); ++c) {
            s[c] = score(z, candidates[c]);
            if (std::isnan(s[c])) return candidates[c];
            m = std::max(m, s[c]);
        }
        for (size_t c = 0; c < s.size(); ++c)
            if (s[c] == m || s[c] >= m - tie) return candidates[c];
        return 0;
    }

    int64_t resolve(const float* z, const Slots& slots, std::vector<int64_t>& candidates,
                    std::vector<double>& s) const {
        // |float32's score - exact| <= (d + 8) 2^-24 (|z| |a w| + |b|), and what underflows
        const double size = std::sqrt(dot(z, z, d)) * largest_norm + largest_offset;
        const double gap = 2 * double(d + 8) * (0x1p-24 * size + 0x1p-126);
        // float64's, in which nothing underflows; numbers that are infinite have no rounding
        const double tie = std::isfinite(size) ? 0x1p-51 * double(d + 8) * size : 0;
        candidates.clear();
        if (!(size < 1e37)) {  // float32 may overflow; a NaN too
            for (int64_t k = 0; k < K; ++k) candidates.push_back(k);
            return best_of(z, candidates, s, tie);
        }
        const double least = double(*std::max_element(slots.best, slots.best + SLOTS)) - gap;
        bool hidden = false;
        for (int64_t j = 0; j < SLOTS; ++j) {
            hidden |= slots.second[j] >= least;
            if (slots.best[j] >= least)
                for (int64_t v = 0; v < DEPTH; ++v) candidates.push_back(slots.panel[j] * PANEL + v * SLOTS + j);
        }
        if (hidden) {  // a slot has a close second
            candidates.clear();
            alignas(64) float row[PANEL];
            for (int64_t p = 0; p < panels; ++p) {
                score_row(z, d, panel(p), row);
                for (int64_t j = 0; j < PANEL; ++j)
                    if (row[j] >= least) candidates.push_back(p * PANEL + j);
            }
        }
        std::sort(candidates.begin(), candidates.end());
        while (candidates.back() >= K) candidates.pop_back();
        return best_of(z, candidates, s, tie);
    }
};

// ---------------------------------------------------------------------------------------------------------------

// codes [n] of the rows of z [n, d] that are wanted (null: all), -1 of others; the book is packed
template <class Parallel>
void search(const Codes& book, const float* z, const bool* wanted, int64_t n, int64_t* codes, const Parallel& parallel) {
    std::vector<int64_t> list;  // rows that are wanted
    for (int64_t i = 0; i < n; ++i) {
        codes[i] = -1;
        if (!wanted || wanted[i]) list.push_back(i);
    }
    const int64_t count = list.size(), d = book.d;
    const int64_t parts = ceil_div(count, ROWS);
    parallel(0, parts, 1, [&](int64_t begin, int64_t end) {
        std::vector<float> block(ROWS * d);
        std::vector<Slots> slots(ROWS);
        std::vector<int64_t> candidates;
        std::vector<double> scores;
        for (int64_t part = begin; part < end; ++part) {
            const int64_t first = part * count / parts, height = (part + 1) * count / parts - first;  // alike
            for (int64_t i = 0; i < height; ++i) std::copy_n(z + list[first + i] * d, d, block.data() + i * d);
            for (Slots& row : slots) {
                std::fill_n(row.best, SLOTS, -INF), std::fill_n(row.second, SLOTS, -INF);
                std::fill_n(row.panel, SLOTS, 0);
            }
            const int64_t even = std::min(ROWS, ceil_div(height, 6) * 6);  // rows past the end are what was there
            for (int64_t p = 0; p < book.panels; ++p)
                score_panel(block.data(), even, d, book.panel(p), int32_t(p), slots.data());
            for (int64_t i = 0; i < height; ++i)
                codes[list[first + i]] = book.resolve(block.data() + i * d, slots[i], candidates, scores);
        }
    });
}

}  // namespace
}  // namespace mmfuse
