// Cross-entropy of bfloat16 logits on the CPU, in float32 without a matrix of float32.
//
//   loss_i = m_i + log l_i - s_iy      m = max s, l = sum of exp(s - m)      ds_ij = g_i (exp(s_ij - m_i) / l_i - [j = y])
//
// A row is read twice, from the cache the second time. A NaN stays in its row.

#include "../tensor.h"
#include "simd.h"

#include <cmath>
#include <limits>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

namespace mmfuse {
namespace {

MMFUSE_CLONES
float largest(const Bfloat16* s, int64_t n) {
    float m = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : m)
    for (int64_t j = 0; j < n; ++j) {
        const float x = load(s[j]);
        m = x > m ? x : m;
    }
    return m;
}

MMFUSE_CLONES
float sum_exp(const Bfloat16* s, float m, int64_t n) {
    const Exp exp;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; ++j) sum += exp(load(s[j]) - m);
    return sum;
}

MMFUSE_CLONES
void scaled_softmax(const Bfloat16* s, float m, float factor, Bfloat16* d, int64_t n) {
    const Exp exp;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) store(d + j, factor * exp(load(s[j]) - m));
}

struct Rows {
    const Bfloat16* s;
    const int64_t* label;
    int64_t rows, n;

    Rows(const Tensor& logits, const Tensor& labels) {
        check_sizes(logits, "s", {FREE, FREE});
        rows = logits.size(0), n = logits.size(1);
        s = data<Bfloat16>(logits, "s", logits, ScalarType::BFloat16, rows * n);
        label = data<int64_t>(labels, "labels", logits, ScalarType::Long, rows);
        for (int64_t i = 0; i < rows; ++i)
            STD_TORCH_CHECK(label[i] >= 0 && label[i] < n, "labels: expected 0 <= label < ", n, ", got ", label[i]);
    }

    template <class F>
    void each(const F& f) const {
        torch::stable::parallel_for(0, rows, ceil_div(32768, n + 1), [&](int64_t first, int64_t last) {
            for (int64_t i = first; i < last; ++i) f(i, s + i * n);
        });
    }
};

// loss, m and l of every row
void cross_entropy(Tensor s, Tensor labels, Tensor loss, Tensor row_max, Tensor row_sum) {
    const Rows of(s, labels);
    float* out = floats(loss, "loss", s, of.rows);
    float *m = floats(row_max, "row_max", s, of.rows), *l = floats(row_sum, "row_sum", s, of.rows);
    of.each([&](int64_t i, const Bfloat16* row) {
        m[i] = largest(row, of.n);
        l[i] = sum_exp(row, m[i], of.n);
        out[i] = std::log(l[i]) + (m[i] - load(row[of.label[i]]));
    });
}

// the gradient of the logits from that of each row's loss
void cross_entropy_grad(Tensor g, Tensor s, Tensor labels, Tensor row_max, Tensor row_sum, Tensor d) {
    const Rows of(s, labels);
    const float* upstream = floats(g, "g", s, of.rows);
    const float *m = floats(row_max, "row_max", s, of.rows), *l = floats(row_sum, "row_sum", s, of.rows);
    Bfloat16* out = data<Bfloat16>(d, "d", s, ScalarType::BFloat16, of.rows * of.n);
    of.each([&](int64_t i, const Bfloat16* row) {
        scaled_softmax(row, m[i], upstream[i] / l[i], out + i * of.n, of.n);
        const int64_t y = of.label[i];
        store(out + i * of.n + y, upstream[i] * (std::exp(load(row[y]) - m[i]) / l[i] - 1));
    });
}

}  // namespace
}  // namespace mmfuse

STABLE_TORCH_LIBRARY_FRAGMENT(mmfuse_cpu, m) {
    m.def("cross_entropy(Tensor s, Tensor labels, Tensor(a!) loss, Tensor(b!) row_max, Tensor(c!) row_sum) -> ()");
    m.def(
        "cross_entropy_grad(Tensor g, Tensor s, Tensor labels, Tensor row_max, Tensor row_sum, Tensor(a!) d) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mmfuse_cpu, CPU, m) {
    m.impl("cross_entropy", TORCH_BOX(&mmfuse::cross_entropy));
    m.impl("cross_entropy_grad", TORCH_BOX(&mmfuse::cross_entropy_grad));
}
