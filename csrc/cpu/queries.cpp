// The largest similarity over query vectors on the CPU: the maximum after the matrix product, and its sparse gradient.
//
// A pair (image i, text j) has one query k_ij of Q, so its gradient is one row of D numbers in dq and one in dt: 1 / Q of
// the matrix products' work. Every sum has one owner and a fixed order: the number of threads does not change a bit.

#include "../tensor.h"
#include "simd.h"

#include <algorithm>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

namespace mmfuse {
namespace {

constexpr int64_t COLS = 512;  // running maxima and their indices stay in the first-level cache
// the terms of a sum are added in groups of so many, then the groups: rounding errors grow slower
constexpr int64_t TEXTS = 256, IMAGES = 32;
constexpr int64_t OWN = 64;  // rows of dt per task

// s [queries, n] at stride n, part of its columns
MMFUSE_CLONES
void first_max(const float* s, int64_t n, int64_t queries, float* u, uint8_t* index, int64_t cols) {
    int32_t k_of[COLS];
    std::copy_n(s, cols, u);
    std::fill_n(k_of, cols, 0);
    for (int64_t k = 1; k < queries; ++k) {
        const float* s_k = s + k * n;
        const int32_t number = static_cast<int32_t>(k);
#pragma omp simd
        for (int64_t j = 0; j < cols; ++j) {
            const float x = s_k[j], m = u[j];
            // a NaN is the maximum, as in torch
            const bool take = !(x <= m) & (m == m);
            u[j] = take ? x : m;
            k_of[j] = take ? number : k_of[j];
        }
    }
    for (int64_t j = 0; j < cols; ++j) index[j] = static_cast<uint8_t>(k_of[j]);
}

void query_max(Tensor s, Tensor u, Tensor k) {
    STD_TORCH_CHECK(s.dim() == 3 && s.size(1) > 0 && s.size(1) <= 256, "s: expected [m, Q, n] with 1 to 256 queries");
    const int64_t m = s.size(0), queries = s.size(1), n = s.size(2);
    const float* in = floats(s, "s", s, m * queries * n);
    float* out = floats(u, "u", s, m * n);
    uint8_t* index = data<uint8_t>(k, "k", s, ScalarType::Byte, m * n);

    const int64_t across = ceil_div(n, COLS);
    torch::stable::parallel_for(0, m * across, ceil_div(65536, queries * COLS), [&](int64_t begin, int64_t end) {
        for (int64_t part = begin; part < end; ++part) {
            const int64_t i = part / across, j = part % across * COLS, at = i * n + j;
            first_max(in + i * queries * n + j, n, queries, out + at, index + at, std::min(COLS, n - j));
        }
    });
}

// dq_k += sum_j [k_j = k] g_j t_j, of one image
MMFUSE_CLONES
void add_to_queries(const float* g, const uint8_t* k, const float* t, float* dq, int64_t texts, int64_t d) {
    for (int64_t j = 0; j < texts; ++j) {
        const float g_j = g[j];
        const float* t_j = t + j * d;
        float* row = dq + k[j] * d;
#pragma omp simd
        for (int64_t c = 0; c < d; ++c) row[c] += g_j * t_j[c];
    }
}

// dt_j += g_j q_{k_j}, of one image
MMFUSE_CLONES
void add_to_texts(const float* g, const uint8_t* k, const float* q, float* dt, int64_t texts, int64_t d) {
    for (int64_t j = 0; j < texts; ++j) {
        const float g_j = g[j];
        const float* row = q + k[j] * d;
        float* dt_j = dt + j * d;
#pragma omp simd
        for (int64_t c = 0; c < d; ++c) dt_j[c] += g_j * row[c];
    }
}

MMFUSE_CLONES
void add(const float* part, float* total, int64_t n) {
#pragma omp simd
    for (int64_t c = 0; c < n; ++c) total[c] += part[c];
}

void query_grad(Tensor g, Tensor k, Tensor q, Tensor t, Tensor dq, Tensor dt) {
    STD_TORCH_CHECK(q.dim() == 3 && q.size(1) <= 256, "q: expected [m, Q, D] with at most 256 queries");
    check_sizes(g, "g", {q.size(0), FREE});
    const int64_t m = q.size(0), queries = q.size(1), d = q.size(2), n = g.size(1);
    check_sizes(t, "t", {n, d});
    const float *grad = floats(g, "g", g, m * n), *image = floats(q, "q", g, m * queries * d);
    const float* text = floats(t, "t", g, n * d);
    const uint8_t* index = data<uint8_t>(k, "k", g, ScalarType::Byte, m * n);
    STD_TORCH_CHECK(std::all_of(index, index + m * n, [&](uint8_t at) { return at < queries; }),
                    "k: expected indices of the ", queries, " queries of q");
    float* to_image = optional_data<float>(dq, "dq", g, ScalarType::Float, m * queries * d);
    float* to_text = optional_data<float>(dt, "dt", g, ScalarType::Float, n * d);

    if (to_image)
        torch::stable::parallel_for(0, m, ceil_div(65536, n * d + 1), [&](int64_t begin, int64_t end) {
            const int64_t size = queries * d;
            std::vector<float> part(size);
            std::fill(to_image + begin * size, to_image + end * size, 0.0f);
            for (int64_t j = 0; j < n; j += TEXTS)
                for (int64_t i = begin; i < end; ++i) {
                    std::fill(part.begin(), part.end(), 0.0f);
                    add_to_queries(grad + i * n + j, index + i * n + j, text + j * d, part.data(),
                                   std::min(TEXTS, n - j), d);
                    add(part.data(), to_image + i * size, size);
                }
        });
    if (to_text)
        torch::stable::parallel_for(0, ceil_div(n, OWN), 1, [&](int64_t begin, int64_t end) {
            std::vector<float> part(OWN * d);
            for (int64_t j = begin * OWN; j < std::min(end * OWN, n); j += OWN) {
                const int64_t texts = std::min(OWN, n - j);
                for (int64_t first = 0; first < m; first += IMAGES) {
                    std::fill(part.begin(), part.end(), 0.0f);
                    for (int64_t i = first; i < std::min(first + IMAGES, m); ++i)
                        add_to_texts(grad + i * n + j, index + i * n + j, image + i * queries * d, part.data(), texts, d);
                    add(part.data(), to_text + j * d, texts * d);
                }
            }
        });
}

}  // namespace
}  // namespace mmfuse

STABLE_TORCH_LIBRARY_FRAGMENT(mmfuse_cpu, m) {
    m.def("query_max(Tensor s, Tensor(a!) u, Tensor(b!) k) -> ()");
    m.def("query_grad(Tensor g, Tensor k, Tensor q, Tensor t, Tensor(a!) dq, Tensor(b!) dt) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mmfuse_cpu, CPU, m) {
    m.impl("query_max", TORCH_BOX(&mmfuse::query_max));
    m.impl("query_grad", TORCH_BOX(&mmfuse::query_grad));
}
