// Point clouds on a GPU: farthest-point sampling, nearest neighbours, ball query and the gradient of grouping.
//
// Squared distances are (x - x')^2 + (y - y')^2 + (z - z')^2 in float32, each operation rounded, as in plain torch: every
// implementation finds the same indices. They are compared as their bits, which keep the order of numbers >= 0.
// Coordinates come as [B, 3, N]. Everything runs on the current stream; no atomics.

#include "launch.h"

#include <climits>
#include <cstdint>

#include <torch/csrc/stable/library.h>

namespace mmfuse {
namespace {

constexpr int LANES = 32;
constexpr unsigned ALL = 0xffffffffu;
constexpr int INFINITE = 0x7f800000, NEVER = -1, EMPTY = INT_MAX;  // a distance's bits; below and above all of them

struct Point {
    float x, y, z;
};

__device__ Point point_of(const float* p, int64_t n, int64_t j) { return {p[j], p[n + j], p[2 * n + j]}; }

// the bits of the squared distance; NaN is infinite
__device__ int distance(Point a, Point b) {
    const float dx = __fsub_rn(a.x, b.x), dy = __fsub_rn(a.y, b.y), dz = __fsub_rn(a.z, b.z);
    const float d = __fadd_rn(__fadd_rn(__fmul_rn(dx, dx), __fmul_rn(dy, dy)), __fmul_rn(dz, dz));
    return d == d ? __float_as_int(d) : INFINITE;
}

// ---------------------------------------------------------------------------------------------------------------
// farthest_points

// A block per cloud. A thread holds PER points, THREADS apart, with their running minima, in registers; where these do not
// suffice (16 K points), y and z lie in shared memory. One barrier per step: warps leave their farthest in one of two
// buffers, and every warp reduces what all have left.
template <int THREADS, int PER, bool SHARED>
__global__ void __launch_bounds__(THREADS)
    farthest_kernel(const float* points, const int64_t* start, int64_t* index, int n, int64_t k) {
    constexpr int WARPS = THREADS / LANES, HELD = SHARED ? 1 : PER;
    extern __shared__ float yz[];
    __shared__ int2 found[2][WARPS];
    const float* p = points + blockIdx.x * int64_t(3) * n;
    int64_t* out = index + blockIdx.x * k;
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;

    float x[PER], y[HELD], z[HELD];
    int least[PER];
#pragma unroll
    for (int i = 0; i < PER; ++i) {
        const int j = threadIdx.x + i * THREADS;
        const Point q = j < n ? point_of(p, n, j) : Point{INFINITY, 0, 0};
        x[i] = q.x;
        if (SHARED)
            yz[j] = q.y, yz[PER * THREADS + j] = q.z;  // read by this thread alone
        else
            y[i % HELD] = q.y, z[i % HELD] = q.z;
        // a point that is not finite has no distances: it comes last
        least[i] = distance(q, q) == 0 ? INFINITE : NEVER;
    }

    // the host does not look at it: out of range, it is the nearest index
    int last = static_cast<int>(max(int64_t(0), min(start[blockIdx.x], int64_t(n) - 1)));
    for (int64_t step = 0, buffer = 0; step < k; ++step, buffer ^= 1) {
        if (threadIdx.x == 0) out[step] = last;
        const Point from = point_of(p, n, last);
        int best = NEVER, at = 0;
#pragma unroll
        for (int i = 0; i < PER; ++i) {
            const int j = threadIdx.x + i * THREADS;
            const Point q{x[i], SHARED ? yz[j] : y[i % HELD], SHARED ? yz[PER * THREADS + j] : z[i % HELD]};
            least[i] = min(least[i], distance(q, from));
            if (least[i] > best) best = least[i], at = j;
        }
        const int of_warp = __reduce_max_sync(ALL, best);
        at = __reduce_min_sync(ALL, best == of_warp ? at : INT_MAX);
        if (lane == 0) found[buffer][warp] = {of_warp, at};
        __syncthreads();
        const int2 each = lane < WARPS ? found[buffer][lane] : int2{NEVER, INT_MAX};
        const int largest = __reduce_max_sync(ALL, each.x);
        last = __reduce_min_sync(ALL, each.x == largest ? each.y : INT_MAX);
    }
}

template <int THREADS, int PER, bool SHARED = false>
void launch_farthest(const float* p, const int64_t* start, int64_t* index, int64_t b, int64_t n, int64_t k,
                     cudaStream_t stream) {
    const auto kernel = farthest_kernel<THREADS, PER, SHARED>;
    constexpr int bytes = SHARED ? 2 * PER * THREADS * int(sizeof(float)) : 0;
    if (SHARED) check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    kernel<<<unsigned(b), THREADS, bytes, stream>>>(p, start, index, int(n), k);
    check(cudaGetLastError());
}

void farthest_points(Tensor points, Tensor start, Tensor index) {
    check_sizes(points, "points", {FREE, 3, FREE});
    const int64_t b = points.size(0), n = points.size(2);
    check_sizes(index, "index", {b, FREE});
    const int64_t k = index.size(1);
    const float* p = floats(points, "points", points, b * 3 * n);
    const int64_t* first = data<int64_t>(start, "start", points, ScalarType::Long, b);
    int64_t* out = data<int64_t>(index, "index", points, ScalarType::Long, b * k);
    STD_TORCH_CHECK(n > 0 && n <= 16384, "points: expected 1 to 16384 in a cloud, got ", n);
    STD_TORCH_CHECK(b <= INT_MAX, "points: expected less than 2^31 clouds, got ", b);
    if (b == 0) return;
    const torch::stable::accelerator::DeviceGuard guard(points.get_device_index());
    const cudaStream_t stream = current_stream_of(points);
    if (n <= 1024)
        launch_farthest<256, 4>(p, first, out, b, n, k, stream);
    else if (n <= 4096)
        launch_farthest<512, 8>(p, first, out, b, n, k, stream);
    else if (n <= 8192)
        launch_farthest<1024, 8>(p, first, out, b, n, k, stream);
    else
        launch_farthest<1024, 16, true>(p, first, out, b, n, k, stream);
}

// ---------------------------------------------------------------------------------------------------------------
// nearest_neighbors and ball_query

constexpr int WARPS = 8, THREADS = WARPS * LANES, TILE = 1024;  // points of a tile in shared memory

// Calls f(first, bits of the distances to `centre` of the points first + lane) for all points, 32 at a time, in order.
template <int QUERIES, class F>
__device__ void for_points(const float* p, int n, const Point (&centre)[QUERIES], const F& f) {
    __shared__ float tile[3][TILE];
    const int lane = threadIdx.x % LANES;
    for (int begin = 0; begin < n; begin += TILE) {
        const int count = min(TILE, n - begin);
        __syncthreads();
        for (int j = threadIdx.x; j < count; j += THREADS) {
            const Point q = point_of(p, n, begin + j);
            tile[0][j] = q.x, tile[1][j] = q.y, tile[2][j] = q.z;
        }
        __syncthreads();
        for (int first = 0; first < count; first += LANES) {
            const int j = first + lane;
            const bool inside = j < count;
            const Point q = inside ? Point{tile[0][j], tile[1][j], tile[2][j]} : Point{};
            int d[QUERIES];
#pragma unroll
            for (int i = 0; i < QUERIES; ++i) d[i] = inside ? distance(q, centre[i]) : EMPTY;
            f(begin + first, d);
        }
    }
}

// The 32 SLOTS nearest of a query, spread over a warp: slot s is in lane s % 32, smallest first.
template <int SLOTS>
struct List {
    int d[SLOTS], index[SLOTS];

    __device__ void clear() {
#pragma unroll
        for (int s = 0; s < SLOTS; ++s) d[s] = EMPTY, index[s] = 0;
    }

    __device__ int at(int slot) const {
        int found = 0;
#pragma unroll
        for (int s = 0; s < SLOTS; ++s) {
            const int x = __shfl_sync(ALL, d[s], slot % LANES);
            if (slot / LANES == s) found = x;
        }
        return found;
    }

    // after its equals
    __device__ void insert(int x, int i) {
        const int lane = threadIdx.x % LANES;
        int place = 0;
#pragma unroll
        for (int s = 0; s < SLOTS; ++s) place += __popc(__ballot_sync(ALL, d[s] <= x));
#pragma unroll
        for (int s = SLOTS - 1; s >= 0; --s) {
            int d_before = __shfl_up_sync(ALL, d[s], 1), i_before = __shfl_up_sync(ALL, index[s], 1);
            if (s > 0) {
                const int d_last = __shfl_sync(ALL, d[s - 1], LANES - 1);
                const int i_last = __shfl_sync(ALL, index[s - 1], LANES - 1);
                if (lane == 0) d_before = d_last, i_before = i_last;
            }
            const int slot = s * LANES + lane;
            d[s] = slot < place ? d[s] : slot == place ? x : d_before;
            index[s] = slot < place ? index[s] : slot == place ? i : i_before;
        }
    }
};

// A warp keeps the lists of QUERIES queries while tiles of points pass; a point nearer than the k-th is put in.
template <int SLOTS, int QUERIES>
__global__ void __launch_bounds__(THREADS)
    nearest_kernel(const float* query, const float* points, int64_t* index, int g, int n, int k) {
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
    const float* q = query + blockIdx.y * int64_t(3) * g;
    const int row = (blockIdx.x * WARPS + warp) * QUERIES;
    Point centre[QUERIES];
    List<SLOTS> list[QUERIES];
    int last[QUERIES];
#pragma unroll
    for (int i = 0; i < QUERIES; ++i) {
        centre[i] = row + i < g ? point_of(q, g, row + i) : Point{};
        list[i].clear();
        last[i] = EMPTY;
    }
    for_points<QUERIES>(points + blockIdx.y * int64_t(3) * n, n, centre, [&](int first, const int (&d)[QUERIES]) {
#pragma unroll
        for (int i = 0; i < QUERIES; ++i) {
            unsigned nearer = __ballot_sync(ALL, d[i] < last[i]);
            while (nearer) {
                const int from = __ffs(nearer) - 1;
                const int x = __shfl_sync(ALL, d[i], from);
                nearer &= nearer - 1;
                // one that is no longer among the k nearest goes behind them
                list[i].insert(x, first + from);
                last[i] = list[i].at(k - 1);
            }
        }
    });
#pragma unroll
    for (int i = 0; i < QUERIES; ++i)
#pragma unroll
        for (int s = 0; s < SLOTS; ++s) {
            const int slot = s * LANES + lane;
            if (row + i < g && slot < k) index[(blockIdx.y * int64_t(g) + row + i) * k + slot] = list[i].index[s];
        }
}

// A warp per query appends the points that lie in its ball until it has k.
__global__ void __launch_bounds__(THREADS)
    ball_kernel(const float* query, const float* points, float limit, int64_t* index, int g, int n, int k) {
    const int lane = threadIdx.x % LANES, row = blockIdx.x * WARPS + threadIdx.x / LANES;
    const bool real = row < g;
    const Point centre[1] = {real ? point_of(query + blockIdx.y * int64_t(3) * g, g, row) : Point{}};
    int64_t* out = index + (blockIdx.y * int64_t(g) + row) * k;
    int found = real ? 0 : k, first_found = 0;
    for_points<1>(points + blockIdx.y * int64_t(3) * n, n, centre, [&](int first, const int (&d)[1]) {
        const bool inside = d[0] < __float_as_int(limit);
        const unsigned which = __ballot_sync(ALL, inside);
        const int place = found + __popc(which & ((1u << lane) - 1));
        if (inside && place < k) out[place] = first + lane;
        if (found == 0 && which) first_found = first + __ffs(which) - 1;
        found += __popc(which);
    });
    for (int j = found + lane; j < k; j += LANES) out[j] = first_found;
}

struct Pair {
    int64_t b, n, g, k;
    const float *p, *q;
    int64_t* out;

    Pair(const Tensor& query, const Tensor& points, const Tensor& index) {
        check_sizes(points, "points", {FREE, 3, FREE});
        b = points.size(0), n = points.size(2);
        check_sizes(query, "query", {b, 3, FREE});
        g = query.size(2);
        check_sizes(index, "index", {b, g, FREE});
        k = index.size(2);
        STD_TORCH_CHECK(b < 65536 && n > 0 && n <= INT_MAX / 3 && g <= INT_MAX / 3,
                        "query, points: expected less than 65536 clouds of 1 to 2^31 / 3 points");
        STD_TORCH_CHECK(k > 0 && k <= INT_MAX, "index: expected at least one neighbour, got ", k);
        p = floats(points, "points", points, b * 3 * n);
        q = floats(query, "query", points, b * 3 * g);
        out = data<int64_t>(index, "index", points, ScalarType::Long, b * g * k);
    }
};

void nearest_neighbors(Tensor query, Tensor points, Tensor index) {
    const Pair a(query, points, index);
    STD_TORCH_CHECK(a.k <= 64 && a.k <= a.n, "index: expected at most 64 neighbours of ", a.n, " points, got ", a.k);
    if (a.b * a.g == 0) return;
    const torch::stable::accelerator::DeviceGuard guard(points.get_device_index());
    const auto launch = [&](auto kernel, int queries) {
        const dim3 grid(unsigned(ceil_div(a.g, WARPS * queries)), unsigned(a.b));
        kernel<<<grid, THREADS, 0, current_stream_of(points)>>>(a.q, a.p, a.out, int(a.g), int(a.n), int(a.k));
        check(cudaGetLastError());
    };
    if (a.k <= 32)
        launch(nearest_kernel<1, 4>, 4);
    else
        launch(nearest_kernel<2, 2>, 2);
}

void ball_query(Tensor query, Tensor points, double radius, Tensor index) {
    const Pair a(query, points, index);
    if (a.b * a.g == 0) return;
    const torch::stable::accelerator::DeviceGuard guard(points.get_device_index());
    const dim3 grid(unsigned(ceil_div(a.g, WARPS)), unsigned(a.b));
    ball_kernel<<<grid, THREADS, 0, current_stream_of(points)>>>(a.q, a.p, float(radius) * float(radius), a.out,
                                                                 int(a.g), int(a.n), int(a.k));
    check(cudaGetLastError());
}

// ---------------------------------------------------------------------------------------------------------------
// group_grad

// A warp per point: the sum of the rows of g [M, C] that were copied from it, order[begin[i]] .. order[begin[i + 1]].
__global__ void __launch_bounds__(THREADS)
    group_grad_kernel(const float* g, const int64_t* order, const int64_t* begin, float* d, int64_t points, int channels) {
    const int lane = threadIdx.x % LANES;
    const int64_t i = blockIdx.x * int64_t(WARPS) + threadIdx.x / LANES;
    if (i >= points) return;
    const int64_t first = begin[i], end = begin[i + 1];
    for (int c = lane; c < channels; c += LANES) {
        float sum = 0;
        for (int64_t j = first; j < end; ++j) sum += g[order[j] * channels + c];
        d[i * channels + c] = sum;
    }
}

void group_grad(Tensor grad, Tensor order, Tensor begin, Tensor features) {
    check_sizes(grad, "grad", {FREE, FREE});
    check_sizes(features, "features", {FREE, grad.size(1)});
    const int64_t m = grad.size(0), c = grad.size(1), points = features.size(0);
    const float* g = floats(grad, "grad", grad, m * c);
    const int64_t* sorted = data<int64_t>(order, "order", grad, ScalarType::Long, m);
    const int64_t* first = data<int64_t>(begin, "begin", grad, ScalarType::Long, points + 1);
    float* d = floats(features, "features", grad, points * c);
    if (points * c == 0) return;
    const torch::stable::accelerator::DeviceGuard guard(grad.get_device_index());
    group_grad_kernel<<<unsigned(ceil_div(points, WARPS)), THREADS, 0, current_stream_of(grad)>>>(g, sorted, first, d,
                                                                                                 points, int(c));
    check(cudaGetLastError());
}

}  // namespace
}  // namespace mmfuse

STABLE_TORCH_LIBRARY_FRAGMENT(mmfuse_cuda, m) {
    m.def("farthest_points(Tensor points, Tensor start, Tensor(a!) index) -> ()");
    m.def("nearest_neighbors(Tensor query, Tensor points, Tensor(a!) index) -> ()");
    m.def("ball_query(Tensor query, Tensor points, float radius, Tensor(a!) index) -> ()");
    m.def("group_grad(Tensor grad, Tensor order, Tensor begin, Tensor(a!) features) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mmfuse_cuda, CUDA, m) {
    m.impl("farthest_points", TORCH_BOX(&mmfuse::farthest_points));
    m.impl("nearest_neighbors", TORCH_BOX(&mmfuse::nearest_neighbors));
    m.impl("ball_query", TORCH_BOX(&mmfuse::ball_query));
    m.impl("group_grad", TORCH_BOX(&mmfuse::group_grad));
}
