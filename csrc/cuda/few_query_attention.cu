// Attention of a few queries over the tokens of images on a GPU: a block has a head's keys and values in shared memory.
//
//     o = softmax(q K^T / sqrt(d)) V
//
// They are read once, by 16 bytes, and values arrive while the first pass is under way. All keys being there, no maximum
// runs: one pass finds the largest score of each query, another the probabilities and their products with the values. A
// warp has 16 queries and every `splits`-th chunk of 16 keys, whose sums are added in a fixed order. 16-bit products are of
// tensor cores, float32 ones of multiply-adds, both in the same places: sums in float32.

#include "../few_query_tensors.h"
#include "launch.h"
#include "mma.h"

#include <algorithm>
#include <climits>
#include <cstdint>
#include <limits>

#include <cuda_pipeline.h>

#include <torch/csrc/stable/library.h>

namespace mmfuse {
namespace {

constexpr int LANES = 32, MOST_WARPS = 8, ROWS = 16, CHUNK = 16;
constexpr unsigned ALL = 0xffffffffu;
constexpr float INF = std::numeric_limits<float>::infinity();

struct Call : FewQueries {
    int tiles, splits;  // of 16 queries; of the keys
};

constexpr int PER = 16;  // bytes of a vector

// Vectors of a row of D features, and where one lies: lanes that read one of several rows at once meet no bank twice.
template <class T, int D>
struct Row {
    static constexpr int VECTORS = D * int(sizeof(T)) / PER, WIDTH = PER / int(sizeof(T));
    __device__ static int at(int row, int vector) {
        const int turn = (row & 2) | ((row ^ (row >> 2)) & 1) << 2;
        return row * VECTORS + (vector ^ (VECTORS % 8 == 0 ? turn : turn & 2));
    }
};

// The first n rows in shared memory; what there is not is 0, up to a whole chunk.
template <class T, int D>
__device__ void copy(uint4* to, const T* from, int64_t stride, int n, int d) {
    using Of = Row<T, D>;
    const int vectors = (n + CHUNK - 1) / CHUNK * CHUNK * Of::VECTORS;
    for (int i = threadIdx.x; i < vectors; i += blockDim.x) {
        const int row = i / Of::VECTORS, feature = i % Of::VECTORS * Of::WIDTH;
        const bool real = row < n && feature < d;
        __pipeline_memcpy_async(to + Of::at(row, i % Of::VECTORS), from + (real ? row * stride + feature : 0), PER,
                                real ? 0 : PER);
    }
    __pipeline_commit();
}

// 16 queries of a warp, of which a lane has rows `lane / 4` and 8 below, and what is computed of them. T is a type of 16 bits.
template <class T, int D>
struct Queries {
    using Of = Row<T, D>;
    uint4 q[2][D / 32];

    __device__ Queries(const T* from, int64_t stride, int rows, int d) {
        const int lane = threadIdx.x % LANES;
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
            for (int i = 0; i < D / 32; ++i) {
                const int row = lane / 4 + 8 * r, feature = 32 * i + 8 * (lane % 4);
                q[r][i] = row < rows && feature < d ? *reinterpret_cast<const uint4*>(from + row * stride + feature)
                                                    : uint4{};
            }
    }

    // [16, 16], of which a lane has of columns 8 j + 2 (lane % 4) and the next
    __device__ void scores(float (&s)[2][4], const uint4* keys, int first) const {
        const int lane = threadIdx.x % LANES;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
#pragma unroll
            for (int e = 0; e < 4; ++e) s[j][e] = 0;
#pragma unroll
            for (int i = 0; i < D / 32; ++i) {
                // in what order features are summed is free: a lane's are neighbours
                const uint4 k = keys[Of::at(first + 8 * j + lane / 4, 4 * i + lane % 4)], &upper = q[0][i], &lower = q[1][i];
                mma(s[j], upper.x, lower.x, upper.y, lower.y, k.x, k.y, static_cast<T*>(nullptr));
                mma(s[j], upper.z, lower.z, upper.w, lower.w, k.z, k.w, static_cast<T*>(nullptr));
            }
        }
    }

    // o[i][f][2 r + e] is of row r and of feature 32 i + 8 (lane % 4) + 4 e + f
    __device__ static void add(float (&o)[D / 32][4][4], const float (&p)[2][4], const uint4* values, int first) {
        constexpr T* type = nullptr;
        const int lane = threadIdx.x % LANES, row = first + 2 * (lane % 4);
        const uint32_t upper[2] = {packed(p[0][0], p[0][1], type), packed(p[1][0], p[1][1], type)};
        const uint32_t lower[2] = {packed(p[0][2], p[0][3], type), packed(p[1][2], p[1][3], type)};
        const auto* pairs = reinterpret_cast<const uint2*>(values);
#pragma unroll
        for (int i = 0; i < D / 32; ++i) {
            uint2 v[4];
#pragma unroll
            for (int k = 0; k < 4; ++k)
                v[k] = pairs[2 * Of::at(row + k % 2 + k / 2 * 8, 4 * i + lane / 8) + lane / 4 % 2];
#pragma unroll
            for (int f = 0; f < 4; ++f) {
                const auto both = [&](int k) {
                    const unsigned half = f % 2 ? 0x7632 : 0x5410;
                    return f < 2 ? __byte_perm(v[k].x, v[k + 1].x, half) : __byte_perm(v[k].y, v[k + 1].y, half);
                };
                mma(o[i][f], upper[0], lower[0], upper[1], lower[1], both(0), both(2), type);
            }
        }
    }

    __device__ static float exp(float x) { return __expf(x); }

    __device__ static void store(T* to, const float (&x)[8]) {
        constexpr T* type = nullptr;
        *reinterpret_cast<uint4*>(to) = {packed(x[0], x[1], type), packed(x[2], x[3], type), packed(x[4], x[5], type),
                                         packed(x[6], x[7], type)};
    }
};

template <int D>
struct Queries<float, D> {
    using Of = Row<float, D>;
    const float *upper, *lower;  // rows; null: there is none
    int d;

    __device__ Queries(const float* from, int64_t stride, int rows, int d) : d(d) {
        const int row = threadIdx.x % LANES / 4;
        upper = row < rows ? from + row * stride : nullptr, lower = row + 8 < rows ? from + (row + 8) * stride : nullptr;
    }

    __device__ void scores(float (&s)[2][4], const uint4* keys, int first) const {
        const int row = first + threadIdx.x % 4 * 2;
        const auto* k = reinterpret_cast<const float4*>(keys);
        const auto at = [](const float* q, int i) { return q ? *reinterpret_cast<const float4*>(q + 4 * i) : float4{}; };
#pragma unroll
        for (int e = 0; e < 8; ++e) s[e / 4][e % 4] = 0;
#pragma unroll 2
        for (int i = 0; i < d / 4; ++i) {
            const float4 q[2] = {at(upper, i), at(lower, i)};
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const float4 x = k[Of::at(row + j % 2 + j / 2 * 8, i)];
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    float& sum = s[j / 2][2 * r + j % 2];
                    sum += q[r].x * x.x, sum += q[r].y * x.y, sum += q[r].z * x.z, sum += q[r].w * x.w;
                }
            }
        }
    }

    __device__ static void add(float (&o)[D / 32][4][4], const float (&p)[2][4], const uint4* values, int first) {
        const int lane = threadIdx.x % LANES;
        const auto* v = reinterpret_cast<const float4*>(values);
#pragma unroll
        for (int k = 0; k < CHUNK; ++k) {
            // of whom has this column
            const int from = lane / 4 * 4 + k % 8 / 2;
            const float upper = __shfl_sync(ALL, p[k / 8][k % 2], from), lower = __shfl_sync(ALL, p[k / 8][2 + k % 2], from);
#pragma unroll
            for (int i = 0; i < D / 32; ++i)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const float4 x = v[Of::at(first + k, 8 * i + 2 * (lane % 4) + e)];
                    o[i][0][e] += upper * x.x, o[i][1][e] += upper * x.y, o[i][2][e] += upper * x.z, o[i][3][e] += upper * x.w;
                    o[i][0][2 + e] += lower * x.x, o[i][1][2 + e] += lower * x.y;
                    o[i][2][2 + e] += lower * x.z, o[i][3][2 + e] += lower * x.w;
                }
        }
    }

    __device__ static float exp(float x) { return expf(x); }

    __device__ static void store(float* to, const float (&x)[8]) {
        auto* out = reinterpret_cast<float4*>(to);
        out[0] = {x[0], x[1], x[2], x[3]}, out[1] = {x[4], x[5], x[6], x[7]};
    }
};

// f of the four lanes that have a row
template <class F>
__device__ float of_row(float x, const F& f) {
    x = f(x, __shfl_xor_sync(ALL, x, 1));
    return f(x, __shfl_xor_sync(ALL, x, 2));
}

// o [B, Q, H, d], row_max and row_sum [B, H, Q]
template <class T, int D>
__global__ void __launch_bounds__(LANES * MOST_WARPS, 1)
    attend_kernel(Call c, T* o_ptr, const T* q_ptr, const T* k_ptr, const T* v_ptr) {
    extern __shared__ uint4 memory[];
    __shared__ float largest[MOST_WARPS][ROWS];
    __shared__ float sums[MOST_WARPS][ROWS];
    const int all = int(c.queries), d = int(c.d);
    const int64_t b = blockIdx.x / c.heads, h = blockIdx.x % c.heads;
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, tile = warp / c.splits, split = warp % c.splits;

    // the host does not look at them: of an image that is not there the result is NaN, no memory but the tensors' is read
    const int64_t named = c.index ? c.index[b] : b;
    const bool real = named >= 0 && named < c.images;
    const int64_t image = real ? named : 0;
    int64_t begin = 0, n = real ? c.longest : 0;
    if (c.bounds && real) {
        begin = max(int64_t(0), min(c.bounds[image], c.tokens));
        n = min(n, min(c.bounds[image + 1], c.tokens) - begin);
    }
    if (c.lengths && real) n = min(n, c.lengths[image]);
    const int count = static_cast<int>(max(int64_t(0), n));

    constexpr int VECTORS = Row<T, D>::VECTORS;
    const int room = (int(c.longest) + CHUNK - 1) / CHUNK * CHUNK * VECTORS;
    uint4 *keys = memory, *values = memory + room;
    copy<T, D>(keys, k_ptr + image * c.of_k.outer + begin * c.of_k.token + h * c.of_k.head, c.of_k.token, count, d);
    copy<T, D>(values, v_ptr + image * c.of_v.outer + begin * c.of_v.token + h * c.of_v.head, c.of_v.token, count, d);

    const int first = (blockIdx.y * c.tiles + tile) * ROWS;
    const Queries<T, D> queries(q_ptr + b * c.of_q.outer + first * c.of_q.token + h * c.of_q.head, c.of_q.token, all - first, d);
    const auto scores = [&](float (&s)[2][4], int at) {
        queries.scores(s, keys, at);
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            const int key = at + e / 4 * 8 + lane % 4 * 2 + e % 2;
            s[e / 4][e % 4] = key < count ? s[e / 4][e % 4] * c.scale : -INF;
        }
    };

    __pipeline_wait_prior(1);
    __syncthreads();  // keys are there
    const auto larger = [](float x, float y) { return fmaxf(x, y); };
    float most[2] = {-INF, -INF};
    for (int at = split * CHUNK; at < count; at += c.splits * CHUNK) {
        float s[2][4];
        scores(s, at);
#pragma unroll
        for (int e = 0; e < 8; ++e) most[e % 4 / 2] = larger(most[e % 4 / 2], s[e / 4][e % 4]);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        most[r] = of_row(most[r], larger);
        if (lane % 4 == 0) largest[warp][lane / 4 + 8 * r] = most[r];
    }
    __pipeline_wait_prior(0);
    __syncthreads();  // values and maxima are there
#pragma unroll
    for (int r = 0; r < 2; ++r)
        for (int w = 0; w < c.splits; ++w) most[r] = larger(most[r], largest[tile * c.splits + w][lane / 4 + 8 * r]);

    float o[D / 32][4][4] = {}, sum[2] = {};
    for (int at = split * CHUNK; at < count; at += c.splits * CHUNK) {
        float p[2][4];
        scores(p, at);
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            float& x = p[e / 4][e % 4];
            x = queries.exp(x - most[e % 4 / 2]);
            sum[e % 4 / 2] += x;
        }
        queries.add(o, p, values, at);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        sum[r] = of_row(sum[r], [](float x, float y) { return x + y; });
        if (lane % 4 == 0) sums[warp][lane / 4 + 8 * r] = sum[r];
    }

    // a lane meets its own numbers of the other splits
    auto* parts = reinterpret_cast<float4*>(memory + 2 * room) + tile * (c.splits - 1) * (D / 8) * LANES + lane;
    if (split > 0)
#pragma unroll
        for (int i = 0; i < D / 8; ++i) {
            const float(&x)[4] = o[i / 4][i % 4];
            parts[((split - 1) * (D / 8) + i) * LANES] = {x[0], x[1], x[2], x[3]};
        }
    __syncthreads();  // the sums of all splits are there
    if (split > 0) return;
    for (int w = 1; w < c.splits; ++w) {
#pragma unroll
        for (int i = 0; i < D / 8; ++i) {
            const float4 x = parts[((w - 1) * (D / 8) + i) * LANES];
            float(&to)[4] = o[i / 4][i % 4];
            to[0] += x.x, to[1] += x.y, to[2] += x.z, to[3] += x.w;
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) sum[r] += sums[warp + w][lane / 4 + 8 * r];
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int query = first + lane / 4 + 8 * r;
        if (query >= all) continue;
        const float over = !real ? NAN : count > 0 ? 1 / sum[r] : 0.0f;
        T* to = o_ptr + ((b * c.queries + query) * c.heads + h) * c.d;
#pragma unroll
        for (int i = 0; i < D / 32; ++i) {
            const int feature = 32 * i + lane % 4 * 8;
            float x[8];
#pragma unroll
            for (int f = 0; f < 8; ++f) x[f] = o[i][f % 4][2 * r + f / 4] * over;
            if (feature < d) queries.store(to + feature, x);
        }
        const int64_t row = blockIdx.x * c.queries + query;
        if (lane % 4 == 0) c.row_max[row] = most[r], c.row_sum[row] = sum[r];
    }
}

// ---------------------------------------------------------------------------------------------------------------

template <class T, int D>
void launch(const Call& c, const Tensor& o, const Tensor& q, const Tensor& k, const Tensor& v) {
    const auto kernel = attend_kernel<T, D>;
    const int64_t tokens = ceil_div(c.longest, CHUNK) * CHUNK;
    const int64_t bytes = (2 * tokens * int(sizeof(T)) + (c.splits - 1) * c.tiles * ROWS * int(sizeof(float))) * D;
    STD_TORCH_CHECK(bytes <= INT_MAX, "longest: expected keys that shared memory holds, got ", c.longest);
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)));
    const dim3 grid(unsigned(c.rows * c.heads), unsigned(ceil_div(c.queries, c.tiles * ROWS)));
    kernel<<<grid, LANES * c.tiles * c.splits, bytes, current_stream_of(q)>>>(
        c, static_cast<T*>(o.data_ptr()), static_cast<const T*>(q.data_ptr()), static_cast<const T*>(k.data_ptr()),
        static_cast<const T*>(v.data_ptr()));
    check(cudaGetLastError());
}

void few_query_attention(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& kv_index,
                         const std::optional<Tensor>& lengths, const std::optional<Tensor>& cu_seqlens, int64_t longest,
                         Tensor o, Tensor row_max, Tensor row_sum) {
    Call c{few_queries(q, k, v, kv_index, lengths, cu_seqlens, longest, o, row_max, row_sum), 1, 1};
    STD_TORCH_CHECK(c.d <= 128 && c.d % 8 == 0, "q: expected a head of a multiple of 8 features up to 128, got ", c.d);
    STD_TORCH_CHECK(c.queries <= 1 << 19 && c.heads <= INT_MAX && c.rows <= INT_MAX / c.heads,
                    "q: expected at most 2^19 queries and less than 2^31 heads of all rows");
    const int64_t size = q.scalar_type() == ScalarType::Float ? 4 : 2;
    const auto vectors = [&](const Tensor& t, const FewQueries::Strides& s, const char* name) {
        STD_TORCH_CHECK((s.outer | s.token | s.head) * size % PER == 0 && reinterpret_cast<uintptr_t>(t.data_ptr()) % PER == 0,
                        name, ": expected rows and memory aligned to ", PER, " bytes");
    };
    vectors(q, c.of_q, "q"), vectors(k, c.of_k, "k"), vectors(v, c.of_v, "v"), vectors(o, {}, "o");
    if (c.rows * c.queries == 0) return;
    c.tiles = int(std::min<int64_t>(4, ceil_div(c.queries, ROWS)));
    c.splits = int(std::max<int64_t>(1, std::min<int64_t>(c.tiles == 1 ? 4 : 2, ceil_div(longest, CHUNK))));

    const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
    const auto run = [&]<class T>(T*) {
        const auto of = c.d <= 32 ? launch<T, 32> : c.d <= 64 ? launch<T, 64> : c.d <= 96 ? launch<T, 96> : launch<T, 128>;
        of(c, o, q, k, v);
    };
    switch (q.scalar_type()) {
        case ScalarType::Half: return run(static_cast<__half*>(nullptr));
        case ScalarType::BFloat16: return run(static_cast<__nv_bfloat16*>(nullptr));
        case ScalarType::Float: return run(static_cast<float*>(nullptr));
        default: STD_TORCH_CHECK(false, "q: expected float16, bfloat16 or float32");
    }
}

}  // namespace
}  // namespace mmfuse

STABLE_TORCH_LIBRARY_FRAGMENT(mmfuse_cuda, m) {
    m.def(
        "few_query_attention(Tensor q, Tensor k, Tensor v, Tensor? kv_index, Tensor? lengths, Tensor? cu_seqlens, "
        "int longest, Tensor(a!) o, Tensor(b!) row_max, Tensor(c!) row_sum) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mmfuse_cuda, CUDA, m) {
    m.impl("few_query_attention", TORCH_BOX(&mmfuse::few_query_attention));
}
