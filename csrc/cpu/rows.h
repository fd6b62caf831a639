// A row of a modality expert on the CPU: activation and normalisation in one pass, for any runtime's threads.
//
//   h = gelu(x) or x      y = gamma (h - mean) rstd + beta, or h without a norm
//
// The mean is 0 where rows are not centred. Operands are float32 or bfloat16, everything else is float32.
#pragma once

#include "simd.h"

#include <cmath>

namespace mmfuse {
namespace {

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
    const Normal normal{Exp()};
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

MMFUSE_CLONES
void forward_of(const float* x, int64_t rows, int64_t d, bool gelu, const Norm& norm, float* y, float* mean, float* rstd,
                float* h) {
    forward_rows(x, rows, d, gelu, norm, y, mean, rstd, h);
}

}  // namespace
}  // namespace mmfuse
