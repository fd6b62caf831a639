// Passes over a chunk of contrastive logits, S = scale * u, on the CPU, for targets beyond the diagonal: the columns of
// equal key, or a teacher's probabilities.
//
// The results do not depend on the number of threads: partial sums belong to fixed blocks and are added up in a fixed
// order.

#include "logits.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

namespace mmfuse {
namespace {

// Sums over a chunk along its rows, which are whole here, and along its columns, which go on: f(i, begin, end, sums of
// the columns) adds the columns begin to end of row i to theirs and returns the row's.
template <class F>
void sum_chunk(int64_t c, int64_t n, float* row_sum, float* col_sum, const F& f) {
    const int64_t across = ceil_div(n, COLS);
    const std::unique_ptr<float[]> parts(new float[across * c]);
    torch::stable::parallel_for(0, across, 1, [&](int64_t first, int64_t last) {
        for (int64_t k = first; k < last; ++k)
            for (int64_t i = 0; i < c; ++i) parts[k * c + i] = f(i, k * COLS, std::min((k + 1) * COLS, n), col_sum);
    });
    for (int64_t i = 0; i < c; ++i) {
        row_sum[i] = 0;
        for (int64_t k = 0; k < across; ++k) row_sum[i] += parts[k * c + i];
    }
}

MMFUSE_CLONES
float add_equal(const float* u, int32_t key, const int32_t* keys, float row_centre, const float* col_centre,
                float* col_sum, int64_t n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; ++j) {
        sum += keys[j] == key ? u[j] - row_centre : 0.0f;
        col_sum[j] += keys[j] == key ? u[j] - col_centre[j] : 0.0f;
    }
    return sum;
}

// sums of u - centre where the keys are equal, but for the positive
void add_positives(Tensor u, int64_t diagonal, Tensor row_key, Tensor col_key, Tensor row_centre, Tensor col_centre,
                   Tensor row_sum, Tensor col_sum) {
    check_sizes(u, "u", {FREE, FREE});
    const int64_t c = u.size(0), n = u.size(1);
    diagonal = near(diagonal, c, n);
    const float* logits = floats(u, "u", u, c * n);
    const int32_t* rows = data<int32_t>(row_key, "row_key", u, ScalarType::Int, c);
    const int32_t* cols = data<int32_t>(col_key, "col_key", u, ScalarType::Int, n);
    const float *row = floats(row_centre, "row_centre", u, c), *col = floats(col_centre, "col_centre", u, n);
    sum_chunk(c, n, floats(row_sum, "row_sum", u, c), floats(col_sum, "col_sum", u, n),
              [&](int64_t i, int64_t begin, int64_t end, float* sums) {
                  float sum = 0;
                  around(begin, end, i + diagonal, [&](int64_t first, int64_t last) {
                      sum += add_equal(logits + i * n + first, rows[i], cols + first, row[i], col + first, sums + first,
                                       last - first);
                  });
                  return sum;
              });
}

MMFUSE_CLONES
void subtract_equal(float* g, int32_t key, const int32_t* keys, float p, const float* q, int64_t n) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) g[j] -= keys[j] == key ? p + q[j] : 0.0f;
}

// g_ij -= p_i + q_j where the keys are equal
void subtract_targets(Tensor g, Tensor row_key, Tensor col_key, Tensor p, Tensor q) {
    check_sizes(g, "g", {FREE, FREE});
    const int64_t c = g.size(0), n = g.size(1);
    float* grad = floats(g, "g", g, c * n);
    const int32_t* rows = data<int32_t>(row_key, "row_key", g, ScalarType::Int, c);
    const int32_t* cols = data<int32_t>(col_key, "col_key", g, ScalarType::Int, n);
    const float *row_target = floats(p, "p", g, c), *col_target = floats(q, "q", g, n);
    torch::stable::parallel_for(0, c, row_grain(n), [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) subtract_equal(grad + i * n, rows[i], cols, row_target[i], col_target, n);
    });
}

// sum e^{T - row_max} (S - scale row_centre), returned, and sum e^{T - col_max} (S - scale col_centre); the sums of the
// exponentials themselves too, the very same, for a mean that is exact where S does not vary
MMFUSE_CLONES
float add_cross(const float* u, const float* t, float scale, float t_scale, float row_max, const float* col_max,
                float row_centre, const float* col_centre, float& row_sum, float* col_sum, float* col_cross, int64_t n) {
    float teacher[COLS];  // rounded, as for its maxima
    load_logits(t, t_scale, teacher, n);
    const Exp exp;
    float sum = 0, cross = 0;
#pragma omp simd reduction(+ : sum, cross)
    for (int64_t j = 0; j < n; ++j) {
        const float p = exp(teacher[j] - row_max), q = exp(teacher[j] - col_max[j]);
        sum += p;
        col_sum[j] += q;
        cross += p * (scale * (u[j] - row_centre));
        col_cross[j] += q * (scale * (u[j] - col_centre[j]));
    }
    row_sum += sum;
    return cross;
}

// The sums of e^{T - max T} scale (u - centre) over the negatives, T = t_scale * t: those of the columns were against
// col_before and go on against col_max.
void cross_stats(Tensor u, Tensor t, Tensor scale, Tensor t_scale, int64_t diagonal, Tensor row_max, Tensor col_before,
                 Tensor col_max, Tensor row_centre, Tensor col_centre, Tensor row_sum, Tensor col_sum, Tensor row_cross,
                 Tensor col_cross) {
    check_sizes(u, "u", {FREE, FREE});
    const int64_t c = u.size(0), n = u.size(1);
    diagonal = near(diagonal, c, n);
    const float *student = floats(u, "u", u, c * n), *teacher = floats(t, "t", u, c * n);
    const float s = *floats(scale, "scale", u, 1), s_t = *floats(t_scale, "t_scale", u, 1);
    const float* row = floats(row_max, "row_max", u, c);
    const float *before = floats(col_before, "col_before", u, n), *now = floats(col_max, "col_max", u, n);
    const float *row_c = floats(row_centre, "row_centre", u, c), *col_c = floats(col_centre, "col_centre", u, n);
    float *sums = floats(col_sum, "col_sum", u, n), *crosses = floats(col_cross, "col_cross", u, n);
    std::vector<float> col(n), row_part(ceil_div(n, COLS) * c, 0.0f);
    for (int64_t j = 0; j < n; ++j) {
        col[j] = reference(now[j]);
        const float back = std::exp(before[j] - col[j]);
        sums[j] *= back, crosses[j] *= back;
    }
    sum_chunk(c, n, floats(row_cross, "row_cross", u, c), crosses, [&](int64_t i, int64_t begin, int64_t end, float* into) {
        float sum = 0;
        float& part = row_part[begin / COLS * c + i];
        around(begin, end, i + diagonal, [&](int64_t first, int64_t last) {
            const int64_t at = i * n + first;
            sum += add_cross(student + at, teacher + at, s, s_t, reference(row[i]), col.data() + first, row_c[i],
                             col_c + first, part, sums + first, into + first, last - first);
        });
        return sum;
    });
    float* row_total = floats(row_sum, "row_sum", u, c);
    std::fill_n(row_total, c, 0.0f);
    for (int64_t k = 0; k < ceil_div(n, COLS); ++k)
        for (int64_t i = 0; i < c; ++i) row_total[i] += row_part[k * c + i];
}

// Weights and normalisers of a row (a, rho) and of all columns: a e^{S - rho} + b e^{S - kappa}.
struct Softmaxes {
    float a, rho;
    const float *b, *kappa;
};

// g = the student's softmaxes less the teacher's, every term with its own exponential, for they may nearly cancel
MMFUSE_CLONES
void subtract_softmaxes(const float* u, const float* t, float scale, float t_scale, Softmaxes student, Softmaxes teacher,
                        float* g, int64_t n) {
    float s[COLS], s_t[COLS];
    load_logits(u, scale, s, n);
    load_logits(t, t_scale, s_t, n);
    const Exp exp;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
        const float p = student.a * exp(s[j] - student.rho), p_t = teacher.a * exp(s_t[j] - teacher.rho);
        const float q = student.b[j] * exp(s[j] - student.kappa[j]), q_t = teacher.b[j] * exp(s_t[j] - teacher.kappa[j]);
        g[j] = (p - p_t) + (q - q_t);
    }
}

struct Centred {
    float row_mean, row_centre, row_t_centre;
    const float *col_mean, *col_centre, *col_t_centre;
};

// g = the terms of the teacher's softmaxes, each times (mean - scale (u - centre)). Returns the sum of these terms times
// t - t_centre.
MMFUSE_CLONES
float weigh_softmaxes(const float* u, const float* t, float scale, float t_scale, Softmaxes teacher, Centred by, float* g,
                      int64_t n) {
    float s_t[COLS];
    load_logits(t, t_scale, s_t, n);
    const Exp exp;
    float dot = 0;
#pragma omp simd reduction(+ : dot)
    for (int64_t j = 0; j < n; ++j) {
        const float p = teacher.a * exp(s_t[j] - teacher.rho) * (by.row_mean - scale * (u[j] - by.row_centre));
        const float q =
            teacher.b[j] * exp(s_t[j] - teacher.kappa[j]) * (by.col_mean[j] - scale * (u[j] - by.col_centre[j]));
        dot += p * (t[j] - by.row_t_centre) + q * (t[j] - by.col_t_centre[j]);
        g[j] = p + q;
    }
    return dot;
}

// f(i, begin, end) for the parts of all rows
template <class F>
void for_parts(int64_t c, int64_t n, const F& f) {
    torch::stable::parallel_for(0, c, row_grain(n), [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i)
            for (int64_t j = 0; j < n; j += COLS) f(i, j, std::min(COLS, n - j));
    });
}

void distill_grad(Tensor u, Tensor t, Tensor scale, Tensor t_scale, Tensor a, Tensor rho, Tensor b, Tensor kappa,
                  Tensor t_a, Tensor t_rho, Tensor t_b, Tensor t_kappa, Tensor g) {
    check_sizes(u, "u", {FREE, FREE});
    const int64_t c = u.size(0), n = u.size(1);
    const float *student = floats(u, "u", u, c * n), *teacher = floats(t, "t", u, c * n);
    const float s = *floats(scale, "scale", u, 1), s_t = *floats(t_scale, "t_scale", u, 1);
    const float *row_a = floats(a, "a", u, c), *row_rho = floats(rho, "rho", u, c);
    const float *row_t_a = floats(t_a, "t_a", u, c), *row_t_rho = floats(t_rho, "t_rho", u, c);
    const float *col_b = floats(b, "b", u, n), *col_kappa = floats(kappa, "kappa", u, n);
    const float *col_t_b = floats(t_b, "t_b", u, n), *col_t_kappa = floats(t_kappa, "t_kappa", u, n);
    float* grad = floats(g, "g", u, c * n);
    for_parts(c, n, [&](int64_t i, int64_t j, int64_t size) {
        subtract_softmaxes(student + i * n + j, teacher + i * n + j, s, s_t, {row_a[i], row_rho[i], col_b + j, col_kappa + j},
                           {row_t_a[i], row_t_rho[i], col_t_b + j, col_t_kappa + j}, grad + i * n + j, size);
    });
}

void teacher_grad(Tensor u, Tensor t, Tensor scale, Tensor t_scale, Tensor a, Tensor rho, Tensor b, Tensor kappa,
                  Tensor row_mean, Tensor row_centre, Tensor row_t_centre, Tensor col_mean, Tensor col_centre,
                  Tensor col_t_centre, int64_t diagonal, Tensor g, Tensor dot) {
    check_sizes(u, "u", {FREE, FREE});
    const int64_t c = u.size(0), n = u.size(1);
    diagonal = near(diagonal, c, n);
    const float *student = floats(u, "u", u, c * n), *teacher = floats(t, "t", u, c * n);
    const float s = *floats(scale, "scale", u, 1), s_t = *floats(t_scale, "t_scale", u, 1);
    const float *row_a = floats(a, "a", u, c), *row_rho = floats(rho, "rho", u, c);
    const float *col_b = floats(b, "b", u, n), *col_kappa = floats(kappa, "kappa", u, n);
    const float *row_m = floats(row_mean, "row_mean", u, c), *row_c = floats(row_centre, "row_centre", u, c);
    const float *col_m = floats(col_mean, "col_mean", u, n), *col_c = floats(col_centre, "col_centre", u, n);
    const float* row_t_c = floats(row_t_centre, "row_t_centre", u, c);
    const float* col_t_c = floats(col_t_centre, "col_t_centre", u, n);
    float* grad = floats(g, "g", u, c * n);
    double* dots = data<double>(dot, "dot", u, ScalarType::Double, c);
    std::fill_n(dots, c, 0.0);
    for_parts(c, n, [&](int64_t i, int64_t left, int64_t width) {
        around(left, left + width, i + diagonal, [&](int64_t j, int64_t end) {
            const int64_t at = i * n + j;
            dots[i] += weigh_softmaxes(student + at, teacher + at, s, s_t, {row_a[i], row_rho[i], col_b + j, col_kappa + j},
                                       {row_m[i], row_c[i], row_t_c[i], col_m + j, col_c + j, col_t_c + j}, grad + at,
                                       end - j);
        });
    });
}

}  // namespace
}  // namespace mmfuse

STABLE_TORCH_LIBRARY_FRAGMENT(mmfuse_cpu, m) {
    m.def(
        "add_positives(Tensor u, int diagonal, Tensor row_key, Tensor col_key, Tensor row_centre, Tensor col_centre, "
        "Tensor(a!) row_sum, Tensor(b!) col_sum) -> ()");
    m.def("subtract_targets(Tensor(a!) g, Tensor row_key, Tensor col_key, Tensor p, Tensor q) -> ()");
    m.def(
        "cross_stats(Tensor u, Tensor t, Tensor scale, Tensor t_scale, int diagonal, Tensor row_max, "
        "Tensor col_before, Tensor col_max, Tensor row_centre, Tensor col_centre, Tensor(a!) row_sum, "
        "Tensor(b!) col_sum, Tensor(c!) row_cross, Tensor(d!) col_cross) -> ()");
    m.def(
        "distill_grad(Tensor u, Tensor t, Tensor scale, Tensor t_scale, Tensor a, Tensor rho, Tensor b, Tensor kappa, "
        "Tensor t_a, Tensor t_rho, Tensor t_b, Tensor t_kappa, Tensor(a!) g) -> ()");
    m.def(
        "teacher_grad(Tensor u, Tensor t, Tensor scale, Tensor t_scale, Tensor a, Tensor rho, Tensor b, Tensor kappa, "
        "Tensor row_mean, Tensor row_centre, Tensor row_t_centre, Tensor col_mean, Tensor col_centre, "
        "Tensor col_t_centre, int diagonal, Tensor(a!) g, Tensor(b!) dot) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mmfuse_cpu, CPU, m) {
    m.impl("add_positives", TORCH_BOX(&mmfuse::add_positives));
    m.impl("subtract_targets", TORCH_BOX(&mmfuse::subtract_targets));
    m.impl("cross_stats", TORCH_BOX(&mmfuse::cross_stats));
    m.impl("distill_grad", TORCH_BOX(&mmfuse::distill_grad));
    m.impl("teacher_grad", TORCH_BOX(&mmfuse::teacher_grad));
}
