// Rows of modality experts on the CPU: activation and normalisation in one pass each way, while a row is in the cache.
//
//   h = gelu(x) or x      y = gamma (h - mean) rstd + beta, or h without a norm
//   a = gamma g,  xhat = (h - mean) rstd,  dh = rstd (a - mean(a) - xhat mean(a xhat)),  dx = gelu'(x) dh
//   dgamma = sum of g xhat,  dbeta = sum of g
//
// The mean is 0 where rows are not centred, and mean(a) is left out. Sums over rows are of blocks, then of the blocks: the
// number of threads does not change a bit. Operands are float32 or bfloat16, everything else is float32.
//
// And which rows of a stream are whose: a stable counting sort of the experts of its rows.

#include "../tensor.h"
#include "simd.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

namespace mmfuse {
namespace {

constexpr int64_t ROWS = 32;  // of a block

// The normal distribution function and its density, absolute errors below 1e-7. With t = |x| / sqrt(2),
// 1 - Phi(|x|) = e^(-t^2) erfcx(t) / 2, a polynomial of (t - 3.5) / (t + 3.5), fitted to 1.5e-8.
struct Normal {
    const Exp exp;

    MMFUSE_INLINE void operator()(float x, float& cumulative, float& density) const {
        constexpr float k = 4.94974747f;
        const float size = std::fabs(x), s = size < 15.0f ? size : 15.0f, v = (s - k) / (s + k);
        float p = 2.11696909e-4f;
        p = p * v + 1.33517240e-4f;
        p = p * v - 2.15665785e-3f;
        p = p * v + 8.48007906e-3f;
        p = p * v - 2.27115724e-2f;
        p = p * v + 4.72155592e-2f;
        p = p * v - 8.06698246e-2f;
        p = p * v + 1.16565157e-1f;
        p = p * v - 1.44632508e-1f;
        p = p * v + 7.76468283e-2f;
        const float e = exp(-0.5f * s * s), tail = e * p;
        cumulative = x < 0 ? tail : 1.0f - tail;
        density = 0.398942280f * e;
    }
};

struct Norm {
    const float *gamma, *beta;  // null: none
    bool centred;
    float eps;
};

template <class T>
MMFUSE_INLINE void forward_rows(const T* x, int64_t rows, int64_t d, bool gelu, const Norm& norm, T* y, float* mean,
                                float* rstd, float* h) {
    const Normal normal{};
    for (int64_t r = 0; r < rows; ++r, x += d, y += d) {
        if (gelu) {
#pragma omp simd
            for (int64_t j = 0; j < d; ++j) {
                float p, q;
                const float v = load(x[j]);
                normal(v, p, q);
                h[j] = v * p;
            }
        } else {
#pragma omp simd
            for (int64_t j = 0; j < d; ++j) h[j] = load(x[j]);
        }
        if (norm.gamma == nullptr) {
#pragma omp simd
            for (int64_t j = 0; j < d; ++j) store(y + j, h[j]);
            continue;
        }
        float sum = 0, squares = 0;
        if (norm.centred) {
#pragma omp simd reduction(+ : sum)
            for (int64_t j = 0; j < d; ++j) sum += h[j];
        }
        const float m = sum / float(d);
#pragma omp simd reduction(+ : squares)
        for (int64_t j = 0; j < d; ++j) squares += (h[j] - m) * (h[j] - m);
        const float s = 1.0f / std::sqrt(squares / float(d) + norm.eps);
        mean[r] = m;
        rstd[r] = s;
        if (norm.beta != nullptr) {
#pragma omp simd
            for (int64_t j = 0; j < d; ++j) store(y + j, (h[j] - m) * s * norm.gamma[j] + norm.beta[j]);
        } else {
#pragma omp simd
            for (int64_t j = 0; j < d; ++j) store(y + j, (h[j] - m) * s * norm.gamma[j]);
        }
    }
}

// dx may be g; y, which is computed again, may be null; dgamma and dbeta are added to, and null without a norm
template <class T>
MMFUSE_INLINE void backward_rows(const T* g, const T* x, int64_t rows, int64_t d, bool gelu, const Norm& norm,
                                 const float* mean, const float* rstd, T* dx, T* y, float* dgamma, float* dbeta,
                                 float* buffer) {
    const Normal normal{};
    float *h = buffer, *slope = buffer + d, *a = buffer + 2 * d;
    for (int64_t r = 0; r < rows; ++r, g += d, x += d, dx += d) {
        if (gelu) {
#pragma omp simd
            for (int64_t j = 0; j < d; ++j) {
                float p, q;
                const float v = load(x[j]);
                normal(v, p, q);
                h[j] = v * p;
                slope[j] = p + v * q;
            }
        } else {
#pragma omp simd
            for (int64_t j = 0; j < d; ++j) {
                h[j] = load(x[j]);
                slope[j] = 1.0f;
            }
        }
        if (norm.gamma == nullptr) {
#pragma omp simd
            for (int64_t j = 0; j < d; ++j) store(dx + j, load(g[j]) * slope[j]);
        } else {
            const float m = mean[r], s = rstd[r];
            float sum = 0, product = 0;
#pragma omp simd reduction(+ : sum, product)
            for (int64_t j = 0; j < d; ++j) {
                const float v = load(g[j]), xhat = (h[j] - m) * s;
                h[j] = xhat;
                a[j] = v * norm.gamma[j];
                sum += a[j];
                product += a[j] * xhat;
                dgamma[j] += v * xhat;
                dbeta[j] += v;
            }
            const float by_mean = norm.centred ? sum / float(d) : 0.0f, by_xhat = product / float(d);
#pragma omp simd
            for (int64_t j = 0; j < d; ++j) store(dx + j, slope[j] * s * (a[j] - by_mean - h[j] * by_xhat));
            if (y != nullptr && norm.beta != nullptr) {
#pragma omp simd
                for (int64_t j = 0; j < d; ++j) h[j] = h[j] * norm.gamma[j] + norm.beta[j];
            } else if (y != nullptr) {
#pragma omp simd
                for (int64_t j = 0; j < d; ++j) h[j] *= norm.gamma[j];
            }
        }
        if (y != nullptr) {
#pragma omp simd
            for (int64_t j = 0; j < d; ++j) store(y + j, h[j]);
            y += d;
        }
    }
}

MMFUSE_CLONES
void forward_of(const float* x, int64_t rows, int64_t d, bool gelu, const Norm& norm, float* y, float* mean, float* rstd,
                float* h) {
    forward_rows(x, rows, d, gelu, norm, y, mean, rstd, h);
}

MMFUSE_CLONES
void forward_of(const Bfloat16* x, int64_t rows, int64_t d, bool gelu, const Norm& norm, Bfloat16* y, float* mean,
                float* rstd, float* h) {
    forward_rows(x, rows, d, gelu, norm, y, mean, rstd, h);
}

MMFUSE_CLONES
void backward_of(const float* g, const float* x, int64_t rows, int64_t d, bool gelu, const Norm& norm, const float* mean,
                 const float* rstd, float* dx, float* y, float* dgamma, float* dbeta, float* buffer) {
    backward_rows(g, x, rows, d, gelu, norm, mean, rstd, dx, y, dgamma, dbeta, buffer);
}

MMFUSE_CLONES
void backward_of(const Bfloat16* g, const Bfloat16* x, int64_t rows, int64_t d, bool gelu, const Norm& norm,
                 const float* mean, const float* rstd, Bfloat16* dx, Bfloat16* y, float* dgamma, float* dbeta,
                 float* buffer) {
    backward_rows(g, x, rows, d, gelu, norm, mean, rstd, dx, y, dgamma, dbeta, buffer);
}

MMFUSE_CLONES
void add(const float* part, float* total, int64_t n) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) total[j] += part[j];
}

Norm norm_of(const Tensor& gamma, const Tensor& beta, const Tensor& x, bool centred, double eps) {
    const int64_t d = x.size(1);
    return {optional_data<float>(gamma, "gamma", x, ScalarType::Float, d),
            optional_data<float>(beta, "beta", x, ScalarType::Float, d), centred, float(eps)};
}

template <class T>
void forward(const Tensor& x, ScalarType dtype, const Norm& norm, const Tensor& y, const Tensor& mean, const Tensor& rstd,
             bool gelu) {
    const int64_t n = x.size(0), d = x.size(1), stats = norm.gamma ? n : 0;
    const T* in = data<T>(x, "x", x, dtype, n * d);
    T* out = data<T>(y, "y", x, dtype, n * d);
    float *m = floats(mean, "mean", x, stats), *s = floats(rstd, "rstd", x, stats);
    torch::stable::parallel_for(0, n, ceil_div(16384, d + 1), [&](int64_t begin, int64_t end) {
        std::vector<float> h(d);
        const int64_t row = norm.gamma ? begin : 0;
        forward_of(in + begin * d, end - begin, d, gelu, norm, out + begin * d, m + row, s + row, h.data());
    });
}

template <class T>
void backward(const Tensor& g, const Tensor& x, ScalarType dtype, const Norm& norm, const Tensor& mean, const Tensor& rstd,
              const Tensor& dx, const Tensor& y, const Tensor& dgamma, const Tensor& dbeta, bool gelu) {
    const int64_t n = x.size(0), d = x.size(1), stats = norm.gamma ? n : 0, sums = norm.gamma ? d : 0;
    const T *upstream = data<T>(g, "g", x, dtype, n * d), *in = data<T>(x, "x", x, dtype, n * d);
    const float *m = floats(mean, "mean", x, stats), *s = floats(rstd, "rstd", x, stats);
    T *out = data<T>(dx, "dx", x, dtype, n * d), *again = optional_data<T>(y, "y", x, dtype, n * d);
    float *to_gamma = floats(dgamma, "dgamma", x, sums), *to_beta = floats(dbeta, "dbeta", x, sums);

    const int64_t blocks = ceil_div(n, ROWS);
    std::vector<float> parts(2 * sums * blocks);
    torch::stable::parallel_for(0, blocks, ceil_div(16384, ROWS * d + 1), [&](int64_t begin, int64_t end) {
        std::vector<float> buffer(3 * d);
        for (int64_t block = begin; block < end; ++block) {
            const int64_t first = block * ROWS, at = first * d, row = norm.gamma ? first : 0;
            float* part = parts.data() + 2 * sums * block;
            backward_of(upstream + at, in + at, std::min(ROWS, n - first), d, gelu, norm, m + row, s + row, out + at,
                        again ? again + at : nullptr, part, part + sums, buffer.data());
        }
    });
    for (int64_t block = 0; block < blocks && sums; ++block) {
        add(parts.data() + 2 * sums * block, to_gamma, d);
        add(parts.data() + 2 * sums * block + sums, to_beta, d);
    }
}

// y, mean and rstd of x [n, D]; gamma and beta may be empty
void expert_rows(Tensor x, Tensor gamma, Tensor beta, Tensor y, Tensor mean, Tensor rstd, bool gelu, bool centred,
                 double eps) {
    check_sizes(x, "x", {FREE, FREE});
    const Norm norm = norm_of(gamma, beta, x, centred, eps);
    if (x.scalar_type() == ScalarType::Float)
        forward<float>(x, ScalarType::Float, norm, y, mean, rstd, gelu);
    else
        forward<Bfloat16>(x, ScalarType::BFloat16, norm, y, mean, rstd, gelu);
}

// dx, and y where it is not empty; dgamma and dbeta [D] are added to
void expert_rows_grad(Tensor g, Tensor x, Tensor gamma, Tensor beta, Tensor mean, Tensor rstd, Tensor dx, Tensor y,
                      Tensor dgamma, Tensor dbeta, bool gelu, bool centred) {
    check_sizes(x, "x", {FREE, FREE});
    const Norm norm = norm_of(gamma, beta, x, centred, 0);
    if (x.scalar_type() == ScalarType::Float)
        backward<float>(g, x, ScalarType::Float, norm, mean, rstd, dx, y, dgamma, dbeta, gelu);
    else
        backward<Bfloat16>(g, x, ScalarType::BFloat16, norm, mean, rstd, dx, y, dgamma, dbeta, gelu);
}

// ids [T] -> offsets [experts + 1]; order [T], the row that each place has; inverse [T], each row's place
void route(Tensor offsets, Tensor order, Tensor inverse, Tensor ids, int64_t experts) {
    check_sizes(ids, "ids", {FREE});
    const int64_t rows = ids.size(0);
    STD_TORCH_CHECK(experts > 0 && experts < INT64_MAX, "experts: expected at least 1, got ", experts);
    const int64_t* of = data<int64_t>(ids, "ids", ids, ScalarType::Long, rows);
    int64_t* starts = data<int64_t>(offsets, "offsets", ids, ScalarType::Long, experts + 1);
    int64_t* places = data<int64_t>(order, "order", ids, ScalarType::Long, rows);
    int64_t* back = data<int64_t>(inverse, "inverse", ids, ScalarType::Long, rows);
    std::vector<int64_t> next(experts + 1);
    for (int64_t row = 0; row < rows; ++row) {
        STD_TORCH_CHECK(of[row] >= 0 && of[row] < experts, "ids: expected 0 <= id < ", experts, ", got ", of[row]);
        ++next[of[row] + 1];
    }
    for (int64_t e = 0; e < experts; ++e) next[e + 1] += next[e];
    std::copy(next.begin(), next.end(), starts);
    for (int64_t row = 0; row < rows; ++row) {
        back[row] = next[of[row]]++;
        places[back[row]] = row;
    }
}

}  // namespace
}  // namespace mmfuse

STABLE_TORCH_LIBRARY_FRAGMENT(mmfuse_cpu, m) {
    m.def(
        "expert_rows(Tensor x, Tensor gamma, Tensor beta, Tensor(a!) y, Tensor(b!) mean, Tensor(c!) rstd, bool gelu, "
        "bool centred, float eps) -> ()");
    m.def(
        "expert_rows_grad(Tensor g, Tensor x, Tensor gamma, Tensor beta, Tensor mean, Tensor rstd, Tensor(a!) dx, "
        "Tensor(b!) y, Tensor(c!) dgamma, Tensor(d!) dbeta, bool gelu, bool centred) -> ()");
    m.def("route(Tensor(a!) offsets, Tensor(b!) order, Tensor(c!) inverse, Tensor ids, int experts) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mmfuse_cpu, CPU, m) {
    m.impl("expert_rows", TORCH_BOX(&mmfuse::expert_rows));
    m.impl("expert_rows_grad", TORCH_BOX(&mmfuse::expert_rows_grad));
    m.impl("route", TORCH_BOX(&mmfuse::route));
}
