// Passes over a chunk of contrastive logits, S = scale * u, on the CPU.
//
// Both directions share one exponential per logit, e^{S - R} with one reference R, wherever the numbers at hand lie
// close enough together that no digits are lost; elsewhere each direction takes its own. The results do not depend
// on the number of threads: partial sums belong to fixed blocks and are added up in a fixed order.

#include "logits.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

namespace mmfuse {
namespace {

constexpr int64_t ROWS = 64;  // a tile of ROWS x COLS, 128 KiB, stays in the second-level cache
constexpr int64_t BAND = 4, LANES = 16;  // it is padded to whole bands of rows and whole vectors
constexpr float NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();

// ---------------------------------------------------------------------------------------------------------------
// logit_stats

// q = rint(u / step), and the logits of what is kept, so that the probabilities of the backward sum to one. A row of
// zeros may have step 0.
MMFUSE_CLONES
void round_logits(const float* u, float scale, float step, int16_t* q, float* s, int64_t n) {
    const float inverse = step > 0 ? 1 / step : 0.0f, low = opaque(-32767.0f), high = opaque(32767.0f);
    const float round = 12582912.0f;  // 1.5 * 2^23: adding it leaves an integer, in two's complement in the low bits
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
        float x = u[j] * inverse;
        x = x < low ? low : x;
        x = x > high ? high : x;
        x += round;
        q[j] = static_cast<int16_t>(std::bit_cast<uint32_t>(x));
        s[j] = (scale * step) * (x - round);
    }
}

// Maxima of a band of rows (NaN is passed over: the sums show it).
MMFUSE_INLINE void band_max(const float* s, int64_t cols, float* row_max, float* col_max) {
    const float *s0 = s, *s1 = s + COLS, *s2 = s + 2 * COLS, *s3 = s + 3 * COLS;
    float m0 = -INF, m1 = -INF, m2 = -INF, m3 = -INF;
#pragma omp simd reduction(max : m0, m1, m2, m3)
    for (int64_t j = 0; j < cols; ++j) {
        const float a = s0[j], b = s1[j], c = s2[j], d = s3[j];
        m0 = a > m0 ? a : m0;
        m1 = b > m1 ? b : m1;
        m2 = c > m2 ? c : m2;
        m3 = d > m3 ? d : m3;
        const float ab = a > b ? a : b, cd = c > d ? c : d;
        const float m = ab > cd ? ab : cd;
        col_max[j] = m > col_max[j] ? m : col_max[j];
    }
    row_max[0] = m0, row_max[1] = m1, row_max[2] = m2, row_max[3] = m3;
}

// Sums of a band of rows: e^S 2^-k for rows and columns alike.
MMFUSE_INLINE void band_sum(const float* s, int64_t cols, float k, float* row_sum, float* col_sum) {
    const Exp exp(k);
    const float *s0 = s, *s1 = s + COLS, *s2 = s + 2 * COLS, *s3 = s + 3 * COLS;
    float l0 = 0, l1 = 0, l2 = 0, l3 = 0;
#pragma omp simd reduction(+ : l0, l1, l2, l3)
    for (int64_t j = 0; j < cols; ++j) {
        const float a = exp(s0[j]), b = exp(s1[j]), c = exp(s2[j]), d = exp(s3[j]);
        l0 += a, l1 += b, l2 += c, l3 += d;
        col_sum[j] += (a + b) + (c + d);
    }
    row_sum[0] = l0, row_sum[1] = l1, row_sum[2] = l2, row_sum[3] = l3;
}

// Per row or per column: the maximum of its logits and the sum of e^{S - max}.
struct Stats {
    float *max, *sum;

    Stats at(int64_t i) const { return {max + i, sum + i}; }
};

// A padded tile of logits S, -inf where there is no negative.
MMFUSE_CLONES
void tile_stats(const float* s, int64_t rows, int64_t cols, Stats row, Stats col) {
    std::fill_n(col.max, cols, -INF);
    std::fill_n(col.sum, cols, 0.0f);
    for (int64_t i = 0; i < rows; i += BAND) band_max(s + i * COLS, cols, row.max + i, col.max);

    float high = -INF, low = INF;
#pragma omp simd reduction(max : high) reduction(min : low)
    for (int64_t i = 0; i < rows; ++i) {
        high = row.max[i] > high ? row.max[i] : high;
        low = row.max[i] > -INF && row.max[i] < low ? row.max[i] : low;
    }
#pragma omp simd reduction(min : low)
    for (int64_t j = 0; j < cols; ++j) low = col.max[j] > -INF && col.max[j] < low ? col.max[j] : low;

    // the smallest maximum keeps its terms down to e^{-38} of it; where all are equal e^{S - max} may well be 1, exactly
    if (high != low && high - low <= 50.0f && std::abs(high) < 1e5f) {
        const float k = power_of_two(high);
        for (int64_t i = 0; i < rows; i += BAND) band_sum(s + i * COLS, cols, k, row.sum + i, col.sum);
        // divided by the very exponential of the maximum: among equal logits each term is 1
        const Exp exp(k);
#pragma omp simd
        for (int64_t i = 0; i < rows; ++i) row.sum[i] /= exp(reference(row.max[i], high));
#pragma omp simd
        for (int64_t j = 0; j < cols; ++j) col.sum[j] /= exp(reference(col.max[j], high));
        return;
    }
    const Exp exp;
    for (int64_t i = 0; i < rows; ++i) {
        const float m = reference(row.max[i]);
        const float* s_i = s + i * COLS;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < cols; ++j) {
            sum += exp(s_i[j] - m);
            col.sum[j] += exp(s_i[j] - reference(col.max[j]));
        }
        row.sum[i] = sum;
    }
}

// into <- the statistics of both sets of logits together
MMFUSE_CLONES
void merge_stats(Stats into, Stats from, int64_t n) {
    const Exp exp;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
        const float m = from.max[i] > into.max[i] ? from.max[i] : into.max[i];
        into.sum[i] = into.sum[i] * exp(into.max[i] - reference(m)) + from.sum[i] * exp(from.max[i] - reference(m));
        into.max[i] = m;
    }
}

void logit_stats(Tensor u, Tensor scale, int64_t diagonal, Tensor step, Tensor row_max, Tensor row_sum,
                 Tensor col_max, Tensor col_sum, Tensor q) {
    check_sizes(u, "u", {FREE, FREE});
    const int64_t c = u.size(0), n = u.size(1);
    diagonal = near(diagonal, c, n);
    const float* logits = floats(u, "u", u, c * n);
    const float s = *floats(scale, "scale", u, 1);
    const Stats row{floats(row_max, "row_max", u, c), floats(row_sum, "row_sum", u, c)};
    const Stats col{floats(col_max, "col_max", u, n), floats(col_sum, "col_sum", u, n)};
    int16_t* fixed = optional_data<int16_t>(q, "q", u, ScalarType::Short, c * n);
    const float* steps = fixed ? floats(step, "step", u, c) : nullptr;

    // every tile leaves the statistics of its rows [across, c] and of its columns [down, n], padded like the tiles
    const int64_t across = ceil_div(n, COLS), down = ceil_div(c, ROWS);
    const int64_t height = down * ROWS, width = across * COLS;
    const std::unique_ptr<float[]> memory(new float[2 * (across * height + down * width)]);
    const Stats row_part{memory.get(), memory.get() + across * height};
    const Stats col_part{row_part.sum + across * height, row_part.sum + across * height + down * width};

    torch::stable::parallel_for(0, down * across, 1, [&](int64_t begin, int64_t end) {
        alignas(64) static thread_local float tile[ROWS * COLS];
        for (int64_t t = begin; t < end; ++t) {
            const int64_t top = t / across * ROWS, left = t % across * COLS;
            const int64_t rows = std::min(ROWS, c - top), cols = std::min(COLS, n - left);
            const int64_t padded_rows = ceil_div(rows, BAND) * BAND, padded_cols = ceil_div(cols, LANES) * LANES;
            for (int64_t i = 0; i < padded_rows; ++i) {
                float* s_i = tile + i * COLS;
                if (i >= rows) {
                    std::fill_n(s_i, padded_cols, -INF);
                    continue;
                }
                const float* u_i = logits + (top + i) * n + left;
                if (fixed)
                    round_logits(u_i, s, steps[top + i], fixed + (top + i) * n + left, s_i, cols);
                else
                    load_logits(u_i, s, s_i, cols);
                std::fill(s_i + cols, s_i + padded_cols, -INF);
                const int64_t positive = top + i + diagonal - left;
                if (positive >= 0 && positive < cols) s_i[positive] = -INF;
            }
            tile_stats(tile, padded_rows, padded_cols, row_part.at(t % across * height + top),
                       col_part.at(t / across * width + left));
        }
    });

    torch::stable::parallel_for(0, across, 1, [&](int64_t begin, int64_t end) {
        const int64_t first = begin * COLS, last = std::min(end * COLS, n);
        for (int64_t k = 0; k < down; ++k) merge_stats(col.at(first), col_part.at(k * width + first), last - first);
        for (int64_t j = first; j < last; ++j)
            if (std::isnan(col.sum[j])) col.max[j] = col.sum[j];
    });
    torch::stable::parallel_for(0, down, 1, [&](int64_t begin, int64_t end) {
        const int64_t first = begin * ROWS, last = std::min(end * ROWS, c);
        std::fill(row.max + first, row.max + last, -INF);
        std::fill(row.sum + first, row.sum + last, 0.0f);
        for (int64_t k = 0; k < across; ++k)
            merge_stats(row.at(first), row_part.at(k * height + first), last - first);
        for (int64_t i = first; i < last; ++i)
            if (std::isnan(row.sum[i])) row.max[i] = row.sum[i];
    });
}

// ---------------------------------------------------------------------------------------------------------------
// logit_grad

// The columns' part of the gradient in a block of columns, behind one exponential: b e^{S - kappa} = (e^S 2^-k) B.
struct Block {
    float high, k;  // the largest normaliser (-inf: all weights are 0; NaN: they lie too far apart) and its power of two
    bool zeros;  // some weight is 0
};

// Normalisers as far apart as this share a power of two, that of the largest: e^S 2^-k overflows only where the formula
// does, and what underflows in it is below e^{2 SPREAD - 88}.
constexpr float SPREAD = 20.0f;

MMFUSE_CLONES
Block scale_weights(const float* b, const float* kappa, float* scaled, int64_t n) {
    float low = INF, high = -INF;
    int zeros = 0;
#pragma omp simd reduction(min : low) reduction(max : high) reduction(| : zeros)
    for (int64_t j = 0; j < n; ++j) {
        const bool zero = b[j] == 0.0f;
        const float below = zero ? INF : kappa[j], above = zero ? -INF : kappa[j];
        low = below < low ? below : low;
        high = above > high ? above : high;
        zeros |= zero;
    }
    const bool close = high - low <= SPREAD && !(std::abs(high) >= 1e5f);
    const float k = std::isfinite(high) ? power_of_two(high) : 0.0f;
    const Exp exp(k);
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) scaled[j] = b[j] == 0.0f ? 0.0f : b[j] / exp(kappa[j]);
    return {close || high < low ? high : NOT_A_NUMBER, k, zeros != 0};
}

bool can_share(const Block& block, float a, float rho) {
    if (a == 0.0f) return !block.zeros && !std::isnan(block.high);
    return block.high == -INF ? std::abs(rho) < 1e5f : std::abs(rho - block.high) <= SPREAD;
}

// Part of a row, S = scale * u: g = (e^S 2^-k) (A + f B) - shift, where 2^k is the larger of rho's and the block's power
// of two, A = a e^{-rho} 2^k and f lifts B to this k. Returns sum g u.
template <class T>
MMFUSE_CLONES float grad_shared(const T* u, float scale, float a, float rho, Block block, const float* scaled_b,
                                float shift, float* g, int64_t n) {
    const bool row_leads = a != 0.0f && !(rho <= block.high);
    const float k = row_leads ? power_of_two(rho) : block.k;
    const Exp exp(k);
    const float scaled_a = a == 0.0f ? 0.0f : a / exp(rho);
    const float factor = block.high == -INF ? 0.0f : std::exp2(k - block.k);
    float dot = 0;
#pragma omp simd reduction(+ : dot)
    for (int64_t j = 0; j < n; ++j) {
        const float x = u[j];
        const float value = exp(scale * x) * (scaled_a + factor * scaled_b[j]) - shift;
        dot += value * x;
        g[j] = value;
    }
    return dot;
}

// The same with an exponential for each direction: g = a e^{S - rho} + b e^{S - kappa} - shift.
template <class T>
MMFUSE_CLONES float grad_separate(const T* u, float scale, float a, float rho, const float* b, const float* kappa,
                                  float shift, float* g, int64_t n) {
    // under a weight of 0 no normaliser may make a NaN
    rho = a == 0.0f ? INF : rho;
    // S is rounded before rho is subtracted, as everywhere: only then do the probabilities sum to one
    float s[COLS];
    load_logits(u, scale, s, n);
    const Exp exp;
    float dot = 0;
#pragma omp simd reduction(+ : dot)
    for (int64_t j = 0; j < n; ++j) {
        const float x = u[j], kappa_j = b[j] == 0.0f ? INF : kappa[j];
        const float value = a * exp(s[j] - rho) + b[j] * exp(s[j] - kappa_j) - shift;
        dot += value * x;
        g[j] = value;
    }
    return dot;
}

// Calls f(begin, end) for all columns of a row but the positive, block by block.
template <class F>
void for_negatives(int64_t n, int64_t positive, const F& f) {
    for (int64_t begin = 0; begin < n; begin += COLS) around(begin, std::min(begin + COLS, n), positive, f);
}

// u is raw (float), or in fixed point (int16): raw = step * u
template <class T>
void logit_grad_rows(const T* u, const float* step, float scale, const float* a, const float* rho, const float* b,
                     const float* kappa, const float* d, float shift, int64_t diagonal, float* g, float* dot,
                     int64_t c, int64_t n) {
    std::vector<float> scaled_b(n);
    std::vector<Block> blocks;
    for (int64_t j = 0; j < n; j += COLS)
        blocks.push_back(scale_weights(b + j, kappa + j, scaled_b.data() + j, std::min(COLS, n - j)));

    torch::stable::parallel_for(0, c, row_grain(n), [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
            const int64_t positive = i + diagonal;
            const float unit = step ? step[i] : 1.0f;
            const T* u_i = u + i * n;
            float* g_i = g + i * n;
            double sum = 0;
            if (positive >= 0 && positive < n) {
                sum = d[i] * u_i[positive];
                g_i[positive] = d[i];
            }
            for_negatives(n, positive, [&](int64_t begin, int64_t end) {
                const Block& block = blocks[begin / COLS];
                const int64_t size = end - begin;
                sum += can_share(block, a[i], rho[i])
                           ? grad_shared(u_i + begin, scale * unit, a[i], rho[i], block, scaled_b.data() + begin, shift,
                                         g_i + begin, size)
                           : grad_separate(u_i + begin, scale * unit, a[i], rho[i], b + begin, kappa + begin, shift,
                                           g_i + begin, size);
            });
            if (dot) dot[i] = float(sum * unit);
        }
    });
}

void logit_grad(Tensor u, Tensor scale, Tensor a, Tensor rho, Tensor b, Tensor kappa, Tensor d, double shift,
                int64_t diagonal, Tensor step, Tensor g, Tensor dot) {
    check_sizes(u, "u", {FREE, FREE});
    const int64_t c = u.size(0), n = u.size(1);
    diagonal = near(diagonal, c, n);
    const auto run = [&]<class T>(const T* logits, const float* steps) {
        logit_grad_rows(logits, steps, *floats(scale, "scale", u, 1), floats(a, "a", u, c), floats(rho, "rho", u, c),
                        floats(b, "b", u, n), floats(kappa, "kappa", u, n), floats(d, "d", u, c), float(shift), diagonal,
                        floats(g, "g", u, c * n), optional_data<float>(dot, "dot", u, ScalarType::Float, c), c, n);
    };
    if (u.scalar_type() == ScalarType::Short)
        run(data<int16_t>(u, "u", u, ScalarType::Short, c * n), floats(step, "step", u, c));
    else
        run(floats(u, "u", u, c * n), static_cast<const float*>(nullptr));
}

// ---------------------------------------------------------------------------------------------------------------
// sigmoid_grad

struct Sums {
    double loss = 0, grad = 0, dot = 0;  // sum softplus, sum G, sum G u
};

// what G of 0 can be multiplied by: a product that overflowed is the largest number, NaN stays
MMFUSE_INLINE float number(float x) {
    constexpr float most = std::numeric_limits<float>::max();
    x = x > most ? most : x;
    return x < -most ? -most : x;
}

// negatives: loss softplus(S), G = sigmoid(S), S = scale * u + bias
MMFUSE_CLONES
void sigmoid_negatives(const float* u, float scale, float bias, float* g, int64_t n, Sums& sums) {
    const Exp exp;
    float loss = 0, grad = 0, dot = 0;
#pragma omp simd reduction(+ : loss, grad, dot)
    for (int64_t j = 0; j < n; ++j) {
        const float x = u[j], s = scale * x + bias, size = std::abs(s);
        const float e = exp(-size);
        // one division for both 1 / (1 + e) and e / (2 + e)
        const float r = 1.0f / ((1.0f + e) * (2.0f + e));
        const float above = r * (2.0f + e), below = e * above, sigma = s < 0 ? below : above;
        loss += (s > 0 ? s : 0.0f) + twice_atanh(e * r * (1.0f + e));
        grad += sigma;
        dot += sigma * number(x);
        g[j] = sigma;
    }
    sums.loss += loss, sums.grad += grad, sums.dot += dot;
}

// the positive: loss softplus(-S), G = sigmoid(S) - 1
float sigmoid_positive(float u, float scale, float bias, Sums& sums) {
    const float s = scale * u + bias, e = std::exp(-std::abs(s));
    const float g = -(s < 0 ? 1.0f : e) / (1.0f + e);
    sums.loss += std::log1p(e) + (s < 0 ? -s : 0.0f);
    sums.grad += g;
    sums.dot += g * number(u);
    return g;
}

void sigmoid_grad(Tensor u, Tensor scale, Tensor bias, int64_t diagonal, bool negative_only, Tensor g, Tensor sums) {
    check_sizes(u, "u", {FREE, FREE});
    const int64_t c = u.size(0), n = u.size(1);
    diagonal = near(diagonal, c, n);
    const float* logits = floats(u, "u", u, c * n);
    const float s = *floats(scale, "scale", u, 1), shift = *floats(bias, "bias", u, 1);
    float* grad = optional_data<float>(g, "g", u, ScalarType::Float, c * n);
    double* out = data<double>(sums, "sums", u, ScalarType::Double, 3 * c);

    torch::stable::parallel_for(0, c, row_grain(n), [&](int64_t first, int64_t last) {
        float unused[COLS];
        for (int64_t i = first; i < last; ++i) {
            const int64_t positive = negative_only ? -1 : i + diagonal;
            const float* u_i = logits + i * n;
            Sums sum;
            const auto at = [&](int64_t j) { return grad ? grad + i * n + j : unused; };
            for_negatives(n, positive, [&](int64_t begin, int64_t end) {
                sigmoid_negatives(u_i + begin, s, shift, at(begin), end - begin, sum);
            });
            if (positive >= 0 && positive < n) {
                // g may be u: u is read first
                const float value = sigmoid_positive(u_i[positive], s, shift, sum);
                *at(positive) = value;
            }
            out[i] = sum.loss, out[c + i] = sum.grad, out[2 * c + i] = sum.dot;
        }
    });
}

}  // namespace
}  // namespace mmfuse

STABLE_TORCH_LIBRARY(mmfuse_cpu, m) {
    m.def(
        "logit_stats(Tensor u, Tensor scale, int diagonal, Tensor step, Tensor(a!) row_max, Tensor(b!) row_sum, "
        "Tensor(c!) col_max, Tensor(d!) col_sum, Tensor(e!) q) -> ()");
    m.def(
        "logit_grad(Tensor u, Tensor scale, Tensor a, Tensor rho, Tensor b, Tensor kappa, Tensor d, float shift, "
        "int diagonal, Tensor step, Tensor(a!) g, Tensor(b!) dot) -> ()");
    m.def(
        "sigmoid_grad(Tensor u, Tensor scale, Tensor bias, int diagonal, bool negative_only, Tensor(a!) g, "
        "Tensor(b!) sums) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mmfuse_cpu, CPU, m) {
    m.impl("logit_stats", TORCH_BOX(&mmfuse::logit_stats));
    m.impl("logit_grad", TORCH_BOX(&mmfuse::logit_grad));
    m.impl("sigmoid_grad", TORCH_BOX(&mmfuse::sigmoid_grad));
}
