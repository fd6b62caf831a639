// The passes of the select-token head on a GPU, one block per row: a LayerNorm of the token that is read, unit length
// with the scale and the mean over clips, and their gradients. The products between them are torch's. Bound by memory;
// sums in float32, in a fixed order, without atomics. The formulas are in kernels/head/blocked.py.

#include "launch.h"

#include <cstdint>
#include <optional>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <torch/csrc/stable/library.h>

namespace mmfuse {
namespace {

constexpr int WARPS = 4, LANES = 32, THREADS = WARPS * LANES;
constexpr float TINY = 1e-12f;

// Two sums over the block, which every thread gets.
__device__ float2 block_sum(float2 v) {
    __shared__ float2 parts[WARPS];
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2) {
        v.x += __shfl_xor_sync(0xffffffffu, v.x, step);
        v.y += __shfl_xor_sync(0xffffffffu, v.y, step);
    }
    __syncthreads();  // the parts of the sum before have been read
    if (threadIdx.x % LANES == 0) parts[threadIdx.x / LANES] = v;
    __syncthreads();
    float2 sum = parts[0];
#pragma unroll
    for (int w = 1; w < WARPS; ++w) {
        sum.x += parts[w].x;
        sum.y += parts[w].y;
    }
    return sum;
}

// The token that row b reads, -1 for one that x has not.
__device__ int64_t token_of(const int64_t* index, int64_t b, int64_t length) {
    const int64_t token = index == nullptr ? 0 : index[b];
    return token >= 0 && token < length ? token : -1;
}

// x [b, length, d] in any strides; z, rows [b, d]; mean, rstd [b]
template <class T>
__global__ void __launch_bounds__(THREADS)
    normalized_kernel(const T* x, const int64_t* index, const T* gamma, const T* beta, T* z, T* rows, float* mean_ptr,
                      float* rstd_ptr, int64_t stride_b, int64_t stride_l, int64_t stride_d, int64_t length, int d,
                      float eps) {
    const int64_t b = blockIdx.x, token = token_of(index, b, length);
    const T* row = x + b * stride_b + (token < 0 ? 0 : token) * stride_l;
    T* out = rows + b * d;
    float2 sum{};
    for (int k = threadIdx.x; k < d; k += THREADS) {
        out[k] = token < 0 ? T(nanf("")) : row[k * stride_d];
        sum.x += float(out[k]);
    }
    const float mean = block_sum(sum).x / d;
    sum = {};
    for (int k = threadIdx.x; k < d; k += THREADS) {
        const float centred = float(out[k]) - mean;
        sum.x += centred * centred;
    }
    const float rstd = rsqrtf(block_sum(sum).x / d + eps);
    for (int k = threadIdx.x; k < d; k += THREADS) {
        const float xhat = (float(out[k]) - mean) * rstd;
        z[b * d + k] = T(xhat * (gamma ? float(gamma[k]) : 1.0f) + (beta ? float(beta[k]) : 0.0f));
    }
    if (threadIdx.x == 0) {
        mean_ptr[b] = mean;
        rstd_ptr[b] = rstd;
    }
}

// y [samples * clips, n] -> out [samples, n], inverse [samples * clips]
template <class T>
__global__ void __launch_bounds__(THREADS)
    unit_kernel(const T* y, const float* scale, T* out, float* inverse, int64_t clips, int n, bool normalize) {
    extern __shared__ float lengths[];  // one over the length of each clip
    const int64_t first = blockIdx.x * clips;
    for (int64_t c = 0; c < clips; ++c) {
        float2 sum{};
        if (normalize)
            for (int k = threadIdx.x; k < n; k += THREADS) {
                const float v = float(y[(first + c) * n + k]);
                sum.x += v * v;
            }
        const float norm = sqrtf(block_sum(sum).x);
        const float one_over = normalize ? 1 / (norm < TINY ? TINY : norm) : 1.0f;  // NaN stays
        if (threadIdx.x == 0) lengths[c] = inverse[first + c] = one_over;
    }
    __syncthreads();
    const float factor = (scale ? *scale : 1.0f) / clips;
    for (int k = threadIdx.x; k < n; k += THREADS) {
        float total = 0;
        for (int64_t c = 0; c < clips; ++c) total += float(y[(first + c) * n + k]) * lengths[c];
        out[blockIdx.x * int64_t(n) + k] = T(total * factor);
    }
}

// g [b / clips, n] in any strides, y [b, n] -> dy [b, n], along [b] = <u, g> / clips
template <class T>
__global__ void __launch_bounds__(THREADS)
    unit_grad_kernel(const T* g, const T* y, const float* inverse, const float* scale, T* dy, float* along,
                     int64_t stride_g, int64_t stride_n, int64_t clips, int n, bool normalize) {
    const int64_t b = blockIdx.x;
    const T* grad = g + b / clips * stride_g;
    const float one_over = inverse[b];
    float2 sum{};
    for (int k = threadIdx.x; k < n; k += THREADS)
        sum.x += float(y[b * n + k]) * one_over * float(grad[k * stride_n]) / clips;
    const float reach = block_sum(sum).x, s = scale ? *scale : 1.0f;
    if (threadIdx.x == 0) along[b] = reach;
    // at the smallest length the divisor is a constant
    const float back = normalize && one_over < 1 / TINY ? s * reach : 0.0f;
    for (int k = threadIdx.x; k < n; k += THREADS) {
        const float u = float(y[b * n + k]) * one_over, du = s * float(grad[k * stride_n]) / clips;
        dy[b * n + k] = T(normalize ? (du - back * u) * one_over : du);
    }
}

// dz, rows [b, d] -> the selected rows of dx [b, length, d], which is zero before
template <class T>
__global__ void __launch_bounds__(THREADS)
    norm_grad_kernel(const T* dz, const T* rows, const int64_t* index, const T* gamma, const float* mean_ptr,
                     const float* rstd_ptr, T* dx, int64_t length, int d) {
    const int64_t b = blockIdx.x, token = token_of(index, b, length);
    if (token < 0) return;
    const float mean = mean_ptr[b], rstd = rstd_ptr[b];
    float2 sum{};
    for (int k = threadIdx.x; k < d; k += THREADS) {
        const float h = float(dz[b * d + k]) * (gamma ? float(gamma[k]) : 1.0f);
        sum.x += h;
        sum.y += h * (float(rows[b * d + k]) - mean) * rstd;
    }
    sum = block_sum(sum);
    for (int k = threadIdx.x; k < d; k += THREADS) {
        const float h = float(dz[b * d + k]) * (gamma ? float(gamma[k]) : 1.0f);
        const float xhat = (float(rows[b * d + k]) - mean) * rstd;
        dx[(b * length + token) * d + k] = T((h - sum.x / d - xhat * sum.y / d) * rstd);
    }
}

// ---------------------------------------------------------------------------------------------------------------

// `run(T{})` for the element type of `t`
template <class Run>
void with_type(const Tensor& t, Run run) {
    switch (t.scalar_type()) {
        case ScalarType::Float: return run(float{});
        case ScalarType::Half: return run(__half{});
        case ScalarType::BFloat16: return run(__nv_bfloat16{});
        default: STD_TORCH_CHECK(false, "x: expected float32, float16 or bfloat16, got type ", int(t.scalar_type()));
    }
}

template <class T>
T* of(const Tensor& t, const char* name, const Tensor& like, int64_t numel) {
    return data<T>(t, name, like, like.scalar_type(), numel);
}

template <class T>
const T* of(const std::optional<Tensor>& t, const char* name, const Tensor& like, int64_t numel) {
    return t ? of<T>(*t, name, like, numel) : nullptr;
}

const int64_t* tokens(const std::optional<Tensor>& t, const Tensor& like, int64_t b) {
    return t ? data<int64_t>(*t, "index", like, ScalarType::Long, b) : nullptr;
}

const float* factor(const std::optional<Tensor>& t, const Tensor& like) {
    return t ? floats(*t, "scale", like, 1) : nullptr;
}

void normalized(Tensor z, Tensor rows, Tensor mean, Tensor rstd, const Tensor& x, const std::optional<Tensor>& index,
                const std::optional<Tensor>& gamma, const std::optional<Tensor>& beta, double eps) {
    check_sizes(x, "x", {FREE, FREE, FREE});
    const int64_t b = x.size(0), length = x.size(1), d = x.size(2);
    STD_TORCH_CHECK(b == 0 || length * d > 0, "x: expected at least one token and one feature");
    if (b == 0) return;
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    with_type(x, [&](auto kind) {
        using T = decltype(kind);
        normalized_kernel<T><<<b, THREADS, 0, current_stream_of(x)>>>(
            static_cast<const T*>(x.data_ptr()), tokens(index, x, b), of<T>(gamma, "gamma", x, d),
            of<T>(beta, "beta", x, d), of<T>(z, "z", x, b * d), of<T>(rows, "rows", x, b * d),
            floats(mean, "mean", x, b), floats(rstd, "rstd", x, b), x.stride(0), x.stride(1), x.stride(2), length,
            static_cast<int>(d), static_cast<float>(eps));
    });
    check(cudaGetLastError());
}

void unit(Tensor out, Tensor inverse, const Tensor& y, const std::optional<Tensor>& scale, bool normalize,
          int64_t clips) {
    check_sizes(y, "y", {FREE, FREE});
    const int64_t b = y.size(0), n = y.size(1);
    STD_TORCH_CHECK(clips > 0 && clips <= 4096 && b % clips == 0, "clips: expected a divisor of ", b,
                    " up to 4096, got ", clips);
    if (b == 0) return;
    const torch::stable::accelerator::DeviceGuard guard(y.get_device_index());
    with_type(y, [&](auto kind) {
        using T = decltype(kind);
        unit_kernel<T><<<b / clips, THREADS, clips * sizeof(float), current_stream_of(y)>>>(
            of<T>(y, "y", y, b * n), factor(scale, y), of<T>(out, "out", y, b / clips * n),
            floats(inverse, "inverse", y, b), clips, static_cast<int>(n), normalize);
    });
    check(cudaGetLastError());
}

void unit_grad(Tensor dy, Tensor along, const Tensor& g, const Tensor& y, const Tensor& inverse,
               const std::optional<Tensor>& scale, bool normalize, int64_t clips) {
    check_sizes(y, "y", {FREE, FREE});
    const int64_t b = y.size(0), n = y.size(1);
    STD_TORCH_CHECK(clips > 0 && b % clips == 0, "clips: expected a divisor of ", b, ", got ", clips);
    check_sizes(g, "g", {b / clips, n});
    STD_TORCH_CHECK(g.scalar_type() == y.scalar_type() && same_device(g, y), "g: expected the type and the device of y");
    if (b == 0) return;
    const torch::stable::accelerator::DeviceGuard guard(y.get_device_index());
    with_type(y, [&](auto kind) {
        using T = decltype(kind);
        unit_grad_kernel<T><<<b, THREADS, 0, current_stream_of(y)>>>(
            static_cast<const T*>(g.data_ptr()), of<T>(y, "y", y, b * n), floats(inverse, "inverse", y, b),
            factor(scale, y), of<T>(dy, "dy", y, b * n), floats(along, "along", y, b), g.stride(0), g.stride(1),
            clips, static_cast<int>(n), normalize);
    });
    check(cudaGetLastError());
}

void norm_grad(Tensor dx, const Tensor& dz, const Tensor& rows, const std::optional<Tensor>& index,
               const std::optional<Tensor>& gamma, const Tensor& mean, const Tensor& rstd) {
    check_sizes(rows, "rows", {FREE, FREE});
    const int64_t b = rows.size(0), d = rows.size(1);
    check_sizes(dx, "dx", {b, FREE, d});
    const int64_t length = dx.size(1);
    STD_TORCH_CHECK(b == 0 || length > 0, "dx: expected at least one token");
    if (b == 0) return;
    const torch::stable::accelerator::DeviceGuard guard(rows.get_device_index());
    with_type(rows, [&](auto kind) {
        using T = decltype(kind);
        norm_grad_kernel<T><<<b, THREADS, 0, current_stream_of(rows)>>>(
            of<T>(dz, "dz", rows, b * d), of<T>(rows, "rows", rows, b * d), tokens(index, rows, b),
            of<T>(gamma, "gamma", rows, d), floats(mean, "mean", rows, b), floats(rstd, "rstd", rows, b),
            of<T>(dx, "dx", rows, b * length * d), length, static_cast<int>(d));
    });
    check(cudaGetLastError());
}

}  // namespace
}  // namespace mmfuse

STABLE_TORCH_LIBRARY_FRAGMENT(mmfuse_cuda, m) {
    m.def(
        "head_normalized(Tensor(a!) z, Tensor(b!) rows, Tensor(c!) mean, Tensor(d!) rstd, Tensor x, Tensor? index, "
        "Tensor? gamma, Tensor? beta, float eps) -> ()");
    m.def("head_unit(Tensor(a!) out, Tensor(b!) inverse, Tensor y, Tensor? scale, bool normalize, int clips) -> ()");
    m.def(
        "head_unit_grad(Tensor(a!) dy, Tensor(b!) along, Tensor g, Tensor y, Tensor inverse, Tensor? scale, "
        "bool normalize, int clips) -> ()");
    m.def(
        "head_norm_grad(Tensor(a!) dx, Tensor dz, Tensor rows, Tensor? index, Tensor? gamma, Tensor mean, "
        "Tensor rstd) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mmfuse_cuda, CUDA, m) {
    m.impl("head_normalized", TORCH_BOX(&mmfuse::normalized));
    m.impl("head_unit", TORCH_BOX(&mmfuse::unit));
    m.impl("head_unit_grad", TORCH_BOX(&mmfuse::unit_grad));
    m.impl("head_norm_grad", TORCH_BOX(&mmfuse::norm_grad));
}
