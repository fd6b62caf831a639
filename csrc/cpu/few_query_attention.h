// Attention of a few queries over few tokens on the CPU, for any runtime's threads: a row and head at a time, in the first-level cache.
//
//     o = softmax(q K^T / sqrt(d)) V
//
// For windows whose products are too small for a library of products: nothing is padded, repeated or written between.

#pragma once

#include "../few_queries.h"
#include "simd.h"

#include <algorithm>
#include <limits>
#include <vector>

namespace mmfuse {
namespace {

constexpr float INF = std::numeric_limits<float>::infinity();

using Strides = FewQueries::Strides;

// features whose products are added up by themselves: a sum of sums rounds less, however a compiler orders each
constexpr int64_t PART = 64;

// <x, y_0> .. <x, y_3>, where y_j is `stride` behind the one before
MMFUSE_INLINE void dots(const float* x, const float* y, int64_t stride, int64_t d, float* to) {
    const float *y1 = y + stride, *y2 = y1 + stride, *y3 = y2 + stride;
    to[0] = to[1] = to[2] = to[3] = 0;
    for (int64_t first = 0; first < d; first += PART) {
        const int64_t end = std::min(d, first + PART);
        float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
        for (int64_t c = first; c < end; ++c)
            s0 += x[c] * y[c], s1 += x[c] * y1[c], s2 += x[c] * y2[c], s3 += x[c] * y3[c];
        to[0] += s0, to[1] += s1, to[2] += s2, to[3] += s3;
    }
}

MMFUSE_INLINE float dot(const float* x, const float* y, int64_t d) {
    float sum = 0;
    for (int64_t first = 0; first < d; first += PART) {
        const int64_t end = std::min(d, first + PART);
        float part = 0;
#pragma omp simd reduction(+ : part)
        for (int64_t c = first; c < end; ++c) part += x[c] * y[c];
        sum += part;
    }
    return sum;
}

// A row: tokens one after another, all heads of each, as they lie in memory. o [queries, heads, d]; p [heads, queries, n]
template <int64_t D>
MMFUSE_INLINE void attend_row(const FewQueries& c, const float* q, const float* k, const float* v, int64_t n, float* o,
                              float* p, float* row_max, float* row_sum) {
    const int64_t heads = c.heads, queries = c.queries, d = D > 0 ? D : c.d;
    const Strides of_q = c.of_q, of_k = c.of_k, of_v = c.of_v;
    const float scale = c.scale;
    const Exp exp{};
    int64_t j = 0;
    for (; j + 4 <= n; j += 4)
        for (int64_t h = 0; h < heads; ++h)
            for (int64_t i = 0; i < queries; ++i)
                dots(q + i * of_q.token + h * of_q.head, k + j * of_k.token + h * of_k.head, of_k.token, d,
                     p + (h * queries + i) * n + j);
    for (; j < n; ++j)
        for (int64_t h = 0; h < heads; ++h)
            for (int64_t i = 0; i < queries; ++i)
                p[(h * queries + i) * n + j] =
                    dot(q + i * of_q.token + h * of_q.head, k + j * of_k.token + h * of_k.head, d);
    for (int64_t i = 0; i < heads * queries; ++i) {
        float *s = p + i * n, most = -INF, sum = 0;
#pragma omp simd reduction(max : most)
        for (int64_t e = 0; e < n; ++e) s[e] *= scale, most = s[e] > most ? s[e] : most;
#pragma omp simd reduction(+ : sum)
        for (int64_t e = 0; e < n; ++e) sum += s[e] = exp(s[e] - most);
        const float over = 1 / sum;
        for (int64_t e = 0; e < n; ++e) s[e] *= over;
        row_max[i] = most, row_sum[i] = sum;
    }
    std::fill_n(o, queries * heads * d, 0.0f);
    for (j = 0; j + 4 <= n; j += 4)
        for (int64_t h = 0; h < heads; ++h)
            for (int64_t i = 0; i < queries; ++i) {
                const float *w = p + (h * queries + i) * n + j, *v0 = v + j * of_v.token + h * of_v.head;
                const float *v1 = v0 + of_v.token, *v2 = v1 + of_v.token, *v3 = v2 + of_v.token;
                float* to = o + (i * heads + h) * d;
#pragma omp simd
                for (int64_t e = 0; e < d; ++e) to[e] += w[0] * v0[e] + w[1] * v1[e] + w[2] * v2[e] + w[3] * v3[e];
            }
    for (; j < n; ++j)
        for (int64_t h = 0; h < heads; ++h)
            for (int64_t i = 0; i < queries; ++i) {
                const float w = p[(h * queries + i) * n + j], *from = v + j * of_v.token + h * of_v.head;
                float* to = o + (i * heads + h) * d;
#pragma omp simd
                for (int64_t e = 0; e < d; ++e) to[e] += w * from[e];
            }
}

MMFUSE_CLONES
void attend(const FewQueries& c, const float* q, const float* k, const float* v, int64_t n, float* o, float* p,
            float* row_max, float* row_sum) {
    if (c.d == 64)
        attend_row<64>(c, q, k, v, n, o, p, row_max, row_sum);
    else
        attend_row<0>(c, q, k, v, n, o, p, row_max, row_sum);
}

// o [rows, queries, heads, d] of float32 queries, keys and values at their strides
template <class Parallel>
void attend_all(const FewQueries& c, const float* q, const float* k, const float* v, float* o, const Parallel& parallel) {
    const auto image_of = [&](int64_t b) { return c.index ? c.index[b] : b; };
    const auto first_of = [&](int64_t i) { return c.bounds ? c.bounds[i] : 0; };
    const auto count_of = [&](int64_t i) {
        return c.bounds ? c.bounds[i + 1] - c.bounds[i] : c.lengths ? c.lengths[i] : c.longest;
    };
    for (int64_t b = 0; b < c.rows; ++b)
        expect(image_of(b) >= 0 && image_of(b) < c.images, "kv_index: expected one of ", c.images, " images");
    int64_t most = 0;
    for (int64_t i = 0; i < c.images; ++i) {
        expect(!c.bounds || (c.bounds[i] >= 0 && c.bounds[i] <= c.bounds[i + 1] && c.bounds[i + 1] <= c.tokens),
               "cu_seqlens: expected bounds that do not fall, up to ", c.tokens);
        expect(count_of(i) >= 0 && count_of(i) <= c.longest, "lengths: expected at most ", c.longest);
        most = std::max(most, count_of(i));
    }
    if (c.rows * c.queries == 0) return;
    const int64_t each = c.queries * c.heads;
    parallel(0, c.rows, ceil_div(65536, each * (most + 1) * c.d), [&](int64_t begin, int64_t end) {
        std::vector<float> p(each * most);
        for (int64_t b = begin; b < end; ++b) {
            const int64_t i = image_of(b), first = first_of(i);
            attend(c, q + b * c.of_q.outer, k + i * c.of_k.outer + first * c.of_k.token,
                   v + i * c.of_v.outer + first * c.of_v.token, count_of(i), o + b * each * c.d, p.data(),
                   c.row_max + b * each, c.row_sum + b * each);
        }
    });
}

}  // namespace
}  // namespace mmfuse
