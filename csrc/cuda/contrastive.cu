// Passes over a chunk of contrastive logits, S = scale * u, on a GPU: streaming kernels bound by memory.
//
// Every kernel reads 16 bytes per access where rows are aligned. Reductions have two levels and no atomics: a block
// leaves one partial result per row and per column, and a second kernel adds them up in a fixed order.

#include "launch.h"

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <torch/csrc/stable/library.h>

namespace mmfuse {
namespace {

constexpr int LANES = 32, WARPS = 8, THREADS = LANES * WARPS;
constexpr unsigned ALL = 0xffffffffu;
constexpr float INF = std::numeric_limits<float>::infinity();

Tensor scratch(const Tensor& u, int64_t numel) { return torch::stable::new_empty(u, {numel}, ScalarType::Float); }

template <int N, class T>
struct alignas(N * sizeof(T)) Vector {
    T at[N];
};

// The N columns of a lane: neighbours where rows are aligned (one access of 16 bytes), else LANES apart (coalesced).
template <bool ALIGNED, int N>
__device__ int column(int lane, int k) {
    return ALIGNED ? lane * N + k : lane + k * LANES;
}

// elements per access
template <bool ALIGNED, int N, class T>
constexpr int WIDTH = ALIGNED ? (16 / sizeof(T) < N ? 16 / sizeof(T) : N) : 1;

// What a lane reads of a part of a row with `left` columns; 0 beyond them.
template <bool ALIGNED, int N, class T>
__device__ void load(const T* row, int lane, int left, T (&out)[N]) {
    constexpr int W = WIDTH<ALIGNED, N, T>;
#pragma unroll
    for (int k = 0; k < N; k += W) {
        const int col = column<ALIGNED, N>(lane, k);
        Vector<W, T> v{};
        if (col < left) v = *reinterpret_cast<const Vector<W, T>*>(row + col);
#pragma unroll
        for (int m = 0; m < W; ++m) out[k + m] = v.at[m];
    }
}

template <bool ALIGNED, int N, class T>
__device__ void store(T* row, int lane, int left, const T (&values)[N]) {
    constexpr int W = WIDTH<ALIGNED, N, T>;
#pragma unroll
    for (int k = 0; k < N; k += W) {
        const int col = column<ALIGNED, N>(lane, k);
        Vector<W, T> v;
#pragma unroll
        for (int m = 0; m < W; ++m) v.at[m] = values[k + m];
        if (col < left) *reinterpret_cast<Vector<W, T>*>(row + col) = v;
    }
}

// A position relative to a part of a row, as an int that is out of the part when the position is.
__device__ int within(int64_t position, int cols) {
    return position < 0 || position >= cols ? -1 : static_cast<int>(position);
}

// ---------------------------------------------------------------------------------------------------------------
// logit_stats

// Per row or per column: the maximum of its logits and the sum of e^{S - max}.
struct Stats {
    float max = -INF, sum = 0;
};

// a maximum over nothing is -inf, and -inf - -inf would be NaN
__device__ float reference(float max) { return max > -INF ? max : 0.0f; }

__device__ Stats merge(Stats a, Stats b) {
    const float m = fmaxf(a.max, b.max);
    return {m, a.sum * __expf(a.max - reference(m)) + b.sum * __expf(b.max - reference(m))};
}

constexpr int PATCH_ROWS = 8, PATCH_COLS = 4;  // the logits that a thread holds
constexpr int STATS_ROWS = WARPS * PATCH_ROWS, STATS_COLS = LANES * PATCH_COLS;  // of a block at a time
constexpr int STATS_SPAN = 8 * STATS_COLS;  // columns of a block

// Warps lie below one another. Rows run along the block's span in registers; the columns of a step meet in shared
// memory. row_part [spans, c], col_part [groups of rows, n].
template <bool ALIGNED>
__global__ void __launch_bounds__(THREADS)
    stats_kernel(const float* u, const float* scale_ptr, int64_t diagonal, const float* step, int16_t* q,
                 Stats* row_part, Stats* col_part, int64_t c, int64_t n) {
    __shared__ Stats columns[2][WARPS][STATS_COLS];
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    const float scale = *scale_ptr;
    const int64_t top = blockIdx.x * int64_t(STATS_ROWS) + warp * PATCH_ROWS;
    const int rows = static_cast<int>(min(c - top, int64_t(PATCH_ROWS)));
    const int64_t begin = blockIdx.y * int64_t(STATS_SPAN), end = min(begin + STATS_SPAN, n);

    Stats row[PATCH_ROWS];
    int buffer = 0;
    for (int64_t first = begin; first < end; first += STATS_COLS, buffer ^= 1) {
        const int left = static_cast<int>(min(n - first, int64_t(STATS_COLS)));
        float s[PATCH_ROWS][PATCH_COLS];
#pragma unroll
        for (int i = 0; i < PATCH_ROWS; ++i) load<ALIGNED>(u + (top + i) * n + first, lane, i < rows ? left : 0, s[i]);
#pragma unroll
        for (int i = 0; i < PATCH_ROWS; ++i) {
            float factor = scale;
            if (q != nullptr && i < rows) {
                // the statistics are those of the kept logits, so that the probabilities of the backward sum to one
                const float unit = step[top + i], inverse = unit > 0 ? 1 / unit : 0.0f;
                int16_t fixed[PATCH_COLS];
#pragma unroll
                for (int k = 0; k < PATCH_COLS; ++k) {
                    const float x = rintf(s[i][k] * inverse);
                    s[i][k] = x < -32767.0f ? -32767.0f : x > 32767.0f ? 32767.0f : x;  // NaN stays
                    fixed[k] = static_cast<int16_t>(s[i][k]);
                }
                store<ALIGNED>(q + (top + i) * n + first, lane, left, fixed);
                factor = scale * unit;
            }
            const int positive = within(top + i + diagonal - first, STATS_COLS);
#pragma unroll
            for (int k = 0; k < PATCH_COLS; ++k) {
                const int col = column<ALIGNED, PATCH_COLS>(lane, k);
                s[i][k] = i < rows && col < left && col != positive ? __fmul_rn(factor, s[i][k]) : -INF;
            }
        }

#pragma unroll
        for (int i = 0; i < PATCH_ROWS; ++i) {
            float m = row[i].max, sum = 0;
#pragma unroll
            for (int k = 0; k < PATCH_COLS; ++k) m = fmaxf(m, s[i][k]);
            const float offset = reference(m);
#pragma unroll
            for (int k = 0; k < PATCH_COLS; ++k) sum += __expf(s[i][k] - offset);
            row[i] = {m, row[i].sum * __expf(row[i].max - offset) + sum};
        }
#pragma unroll
        for (int k = 0; k < PATCH_COLS; ++k) {
            float m = -INF, sum = 0;
#pragma unroll
            for (int i = 0; i < PATCH_ROWS; ++i) m = fmaxf(m, s[i][k]);
            const float offset = reference(m);
#pragma unroll
            for (int i = 0; i < PATCH_ROWS; ++i) sum += __expf(s[i][k] - offset);
            columns[buffer][warp][column<ALIGNED, PATCH_COLS>(lane, k)] = {m, sum};
        }
        // two buffers: the next step's writes do not meet this step's reads
        __syncthreads();
        if (threadIdx.x < left) {
            Stats total;
#pragma unroll
            for (int w = 0; w < WARPS; ++w) total = merge(total, columns[buffer][w][threadIdx.x]);
            col_part[blockIdx.x * n + first + threadIdx.x] = total;
        }
    }

#pragma unroll
    for (int i = 0; i < PATCH_ROWS; ++i) {
#pragma unroll
        for (int offset = LANES / 2; offset > 0; offset /= 2)
            row[i] = merge(row[i], {__shfl_xor_sync(ALL, row[i].max, offset), __shfl_xor_sync(ALL, row[i].sum, offset)});
        if (lane == 0 && i < rows) row_part[blockIdx.y * c + top + i] = row[i];
    }
}

// Adds up part [parts, n] in order, onto what max and sum hold if `running`.
__global__ void merge_kernel(const Stats* part, int64_t parts, int64_t n, bool running, float* max, float* sum) {
    const int64_t i = blockIdx.x * int64_t(THREADS) + threadIdx.x;
    if (i >= n) return;
    Stats total;
    if (running) total = {max[i], sum[i]};
    for (int64_t k = 0; k < parts; ++k) total = merge(total, part[k * n + i]);
    max[i] = isnan(total.sum) ? total.sum : total.max;
    sum[i] = total.sum;
}

bool aligned(const void* p, int64_t row_bytes) {
    return reinterpret_cast<uintptr_t>(p) % 16 == 0 && row_bytes % 16 == 0;
}

void logit_stats(Tensor u, Tensor scale, int64_t diagonal, Tensor step, Tensor row_max, Tensor row_sum,
                 Tensor col_max, Tensor col_sum, Tensor q) {
    check_sizes(u, "u", {FREE, FREE});
    const int64_t c = u.size(0), n = u.size(1);
    diagonal = near(diagonal, c, n);
    const float* logits = floats(u, "u", u, c * n);
    const float* s = floats(scale, "scale", u, 1);
    float *row_m = floats(row_max, "row_max", u, c), *row_l = floats(row_sum, "row_sum", u, c);
    float *col_m = floats(col_max, "col_max", u, n), *col_l = floats(col_sum, "col_sum", u, n);
    int16_t* fixed = optional_data<int16_t>(q, "q", u, ScalarType::Short, c * n);
    const float* steps = fixed ? floats(step, "step", u, c) : nullptr;

    const torch::stable::accelerator::DeviceGuard guard(u.get_device_index());
    const cudaStream_t stream = current_stream_of(u);
    const int64_t groups = ceil_div(c, STATS_ROWS), spans = ceil_div(n, STATS_SPAN);
    const Tensor memory = scratch(u, 2 * (spans * c + groups * n));
    auto* row_part = static_cast<Stats*>(memory.data_ptr());
    Stats* col_part = row_part + spans * c;
    if (c > 0 && n > 0) {
        const bool vectors = aligned(logits, n * 4) && aligned(fixed, 0);
        const auto kernel = vectors ? stats_kernel<true> : stats_kernel<false>;
        kernel<<<dim3(groups, spans), THREADS, 0, stream>>>(logits, s, diagonal, steps, fixed, row_part, col_part, c, n);
        check(cudaGetLastError());
        merge_kernel<<<ceil_div(n, THREADS), THREADS, 0, stream>>>(col_part, groups, n, true, col_m, col_l);
    }
    if (c > 0) merge_kernel<<<ceil_div(c, THREADS), THREADS, 0, stream>>>(row_part, spans, c, false, row_m, row_l);
    check(cudaGetLastError());
}

// ---------------------------------------------------------------------------------------------------------------
// logit_grad and sigmoid_grad: g [c, n] from u [c, n] element by element, with sums along the rows

constexpr int PER_LANE = 8, ROWS_PER_WARP = 8;
constexpr int TILE_ROWS = WARPS * ROWS_PER_WARP, TILE_COLS = LANES * PER_LANE;

// float16 holds 2^13 G: 1/N would be subnormal
template <class G>
__device__ G rounded(float g) {
    if constexpr (std::is_same_v<G, __half>)
        return __float2half_rn(g * 8192.0f);
    else if constexpr (std::is_same_v<G, __nv_bfloat16>)
        return __float2bfloat16_rn(g);
    else
        return g;
}

// G = a_i e^{S - rho_i} + b_j e^{S - kappa_j} - shift, and d_i at the positives; the sum is that of G u
template <class T>
struct SoftmaxGrad {
    static constexpr int SUMS = 1;
    const float *scale, *step, *a, *rho, *b, *kappa, *d;  // step: null unless u is in fixed point
    float shift;

    // under a weight of 0 no normaliser may make a NaN
    struct Col {
        float b, kappa;
    };
    struct Row {
        float unit, scale, a, rho, d;
    };
    __device__ Col col(int64_t j) const { return {b[j], b[j] == 0.0f ? INF : kappa[j]}; }
    __device__ Row row(int64_t i) const {
        const float unit = step ? step[i] : 1.0f;
        return {unit, *scale * unit, a[i], a[i] == 0.0f ? INF : rho[i], d[i]};
    }
    __device__ float operator()(T x, bool positive, const Row& r, const Col& c, float (&terms)[1]) const {
        // S is rounded as in the statistics (no multiply-add): only then do the probabilities sum to one
        const float s = __fmul_rn(r.scale, x);
        const float g = positive ? r.d : r.a * __expf(s - r.rho) + c.b * __expf(s - c.kappa) - shift;
        terms[0] = g * (r.unit * x);
        return g;
    }
};

// softplus(S) and G = sigmoid(S), at the positives softplus(-S) and G = sigmoid(S) - 1; sums of loss, G and G u
struct SigmoidGrad {
    static constexpr int SUMS = 3;
    const float *scale, *bias;

    struct Col {};
    struct Row {
        float scale, bias;
    };
    __device__ Col col(int64_t) const { return {}; }
    __device__ Row row(int64_t) const { return {*scale, *bias}; }
    __device__ float operator()(float x, bool positive, const Row& r, const Col&, float (&terms)[3]) const {
        const float s = r.scale * x + r.bias, z = positive ? -s : s;
        const float e = __expf(-fabsf(z));
        const float sigma = __fdividef(z < 0 ? e : 1.0f, 1.0f + e), g = positive ? -sigma : sigma;
        terms[0] = (z > 0 ? z : 0.0f) + log1pf(e);
        terms[1] = g;
        terms[2] = g == 0.0f ? 0.0f : g * x;  // x may have overflowed
        return g;
    }
};

// A warp walks down ROWS_PER_WARP rows of TILE_COLS columns, one row ahead with its loads. g may be u, or null; part
// [SUMS, tiles of columns, c] may be null.
template <bool ALIGNED, class T, class G, class Op>
__global__ void __launch_bounds__(THREADS, 3)  // 80 registers
    grad_kernel(Op op, const T* u, int64_t diagonal, bool positives, G* g, float* part, int64_t c, int64_t n) {
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    const int64_t first = blockIdx.x * int64_t(TILE_COLS);
    const int left = static_cast<int>(min(n - first, int64_t(TILE_COLS)));
    const int64_t top = blockIdx.y * int64_t(TILE_ROWS) + warp * ROWS_PER_WARP;
    const int64_t bottom = min(top + ROWS_PER_WARP, c);

    typename Op::Col col[PER_LANE];
#pragma unroll
    for (int k = 0; k < PER_LANE; ++k) col[k] = op.col(first + min(column<ALIGNED, PER_LANE>(lane, k), left - 1));

    T ahead[PER_LANE];
    if (top < bottom) load<ALIGNED>(u + top * n + first, lane, left, ahead);
#pragma unroll 1
    for (int64_t i = top; i < bottom; ++i) {
        T x[PER_LANE];
#pragma unroll
        for (int k = 0; k < PER_LANE; ++k) x[k] = ahead[k];
        if (i + 1 < bottom) load<ALIGNED>(u + (i + 1) * n + first, lane, left, ahead);

        const auto row = op.row(i);
        const int positive = positives ? within(i + diagonal - first, TILE_COLS) : -1;
        float sums[Op::SUMS] = {};
        G out[PER_LANE];
#pragma unroll
        for (int k = 0; k < PER_LANE; ++k) {
            const int j = column<ALIGNED, PER_LANE>(lane, k);
            float terms[Op::SUMS];
            out[k] = rounded<G>(op(x[k], j == positive, row, col[k], terms));
#pragma unroll
            for (int t = 0; t < Op::SUMS; ++t) sums[t] += j < left ? terms[t] : 0.0f;
        }
        if (g != nullptr) store<ALIGNED>(g + i * n + first, lane, left, out);
        if (part == nullptr) continue;
#pragma unroll
        for (int t = 0; t < Op::SUMS; ++t) {
#pragma unroll
            for (int offset = LANES / 2; offset > 0; offset /= 2) sums[t] += __shfl_xor_sync(ALL, sums[t], offset);
            if (lane == 0) part[(t * int64_t(gridDim.x) + blockIdx.x) * c + i] = sums[t];
        }
    }
}

// out [sums, c] <- the sum over the tiles of part [sums, tiles, c], in order
template <class Out>
__global__ void sum_kernel(const float* part, int64_t tiles, int64_t c, Out* out) {
    const int64_t i = blockIdx.x * int64_t(THREADS) + threadIdx.x;
    if (i >= c) return;
    double total = 0;
    for (int64_t k = 0; k < tiles; ++k) total += part[(blockIdx.y * tiles + k) * c + i];
    out[blockIdx.y * c + i] = static_cast<Out>(total);
}

template <class T, class G, class Out, class Op>
void launch_grad(const Op& op, const Tensor& u, const T* logits, int64_t diagonal, bool positives, G* g, Out* sums) {
    const int64_t c = u.size(0), n = u.size(1), tiles = ceil_div(n, TILE_COLS);
    if (c == 0) return;
    const cudaStream_t stream = current_stream_of(u);
    const Tensor memory = scratch(u, sums ? Op::SUMS * tiles * c : 0);
    float* part = sums ? static_cast<float*>(memory.data_ptr()) : nullptr;
    if (n > 0) {
        const bool vectors = aligned(logits, n * sizeof(T)) && aligned(g, n * sizeof(G));
        const auto kernel = vectors ? grad_kernel<true, T, G, Op> : grad_kernel<false, T, G, Op>;
        const dim3 grid(tiles, ceil_div(c, TILE_ROWS));
        kernel<<<grid, THREADS, 0, stream>>>(op, logits, diagonal, positives, g, part, c, n);
        check(cudaGetLastError());
    }
    if (sums) {
        sum_kernel<Out><<<dim3(ceil_div(c, THREADS), Op::SUMS), THREADS, 0, stream>>>(part, tiles, c, sums);
        check(cudaGetLastError());
    }
}

// Calls f with a null pointer of the type that g holds.
template <class F>
void with_type_of(const Tensor& g, const F& f) {
    switch (g.scalar_type()) {
        case ScalarType::Float: return f(static_cast<float*>(nullptr));
        case ScalarType::BFloat16: return f(static_cast<__nv_bfloat16*>(nullptr));
        case ScalarType::Half: return f(static_cast<__half*>(nullptr));
        default: STD_TORCH_CHECK(false, "g: expected float32, bfloat16 or float16, got type ", int(g.scalar_type()));
    }
}

void logit_grad(Tensor u, Tensor scale, Tensor a, Tensor rho, Tensor b, Tensor kappa, Tensor d, double shift,
                int64_t diagonal, Tensor step, Tensor g, Tensor dot) {
    check_sizes(u, "u", {FREE, FREE});
    const int64_t c = u.size(0), n = u.size(1);
    diagonal = near(diagonal, c, n);
    const torch::stable::accelerator::DeviceGuard guard(u.get_device_index());
    with_type_of(g, [&]<class G>(G*) {
        G* out = data<G>(g, "g", u, g.scalar_type(), c * n);
        float* sums = optional_data<float>(dot, "dot", u, ScalarType::Float, c);
        const auto run = [&]<class T>(const T* logits, const float* steps) {
            const SoftmaxGrad<T> op{floats(scale, "scale", u, 1), steps, floats(a, "a", u, c), floats(rho, "rho", u, c),
                                    floats(b, "b", u, n), floats(kappa, "kappa", u, n), floats(d, "d", u, c),
                                    float(shift)};
            launch_grad(op, u, logits, diagonal, true, out, sums);
        };
        if (u.scalar_type() == ScalarType::Short)
            run(data<const int16_t>(u, "u", u, ScalarType::Short, c * n), floats(step, "step", u, c));
        else
            run(data<const float>(u, "u", u, ScalarType::Float, c * n), nullptr);
    });
}

void sigmoid_grad(Tensor u, Tensor scale, Tensor bias, int64_t diagonal, bool negative_only, Tensor g, Tensor sums) {
    check_sizes(u, "u", {FREE, FREE});
    const int64_t c = u.size(0), n = u.size(1);
    diagonal = near(diagonal, c, n);
    const torch::stable::accelerator::DeviceGuard guard(u.get_device_index());
    with_type_of(g, [&]<class G>(G*) {
        const SigmoidGrad op{floats(scale, "scale", u, 1), floats(bias, "bias", u, 1)};
        launch_grad(op, u, data<const float>(u, "u", u, ScalarType::Float, c * n), diagonal, !negative_only,
                    optional_data<G>(g, "g", u, g.scalar_type(), c * n),
                    data<double>(sums, "sums", u, ScalarType::Double, 3 * c));
    });
}

}  // namespace
}  // namespace mmfuse

STABLE_TORCH_LIBRARY(mmfuse_cuda, m) {
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

STABLE_TORCH_LIBRARY_IMPL(mmfuse_cuda, CUDA, m) {
    m.impl("logit_stats", TORCH_BOX(&mmfuse::logit_stats));
    m.impl("logit_grad", TORCH_BOX(&mmfuse::logit_grad));
    m.impl("sigmoid_grad", TORCH_BOX(&mmfuse::sigmoid_grad));
}
