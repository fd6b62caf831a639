// Which rows of a stream are whose, on a GPU: a stable counting sort of the experts of T rows by one block, in one launch.
// Bound by latency: each row's expert is read twice. Counts are whole numbers in a fixed order, without atomics.

#include "launch.h"

#include <cstdint>

#include <torch/csrc/stable/library.h>

namespace mmfuse {
namespace {

constexpr int MOST = 16, LANES = 32, THREADS = MOST * LANES;  // a warp for each expert

// One out of range is the caller's error; it stays within the counts.
__device__ int expert_of(int64_t id, int experts) { return id < 0 ? 0 : id < experts ? int(id) : experts - 1; }

// ids [rows] -> offsets [experts + 1]; order [rows], the row that each place has; inverse [rows], each row's place
__global__ void __launch_bounds__(THREADS, 1)
    route_kernel(const int64_t* ids, int64_t* offsets, int64_t* order, int64_t* inverse, int64_t rows, int experts) {
    __shared__ int counts[MOST][THREADS];  // of a thread's rows; then the places of an expert before them
    __shared__ int totals[MOST];
    const int thread = threadIdx.x, lane = thread % LANES, warp = thread / LANES;
    const int64_t share = (rows + THREADS - 1) / THREADS, from = thread * share;
    const int64_t begin = from < rows ? from : rows, end = begin + share < rows ? begin + share : rows;
    for (int e = 0; e < experts; ++e) counts[e][thread] = 0;
    for (int64_t row = begin; row < end; ++row) ++counts[expert_of(ids[row], experts)][thread];
    __syncthreads();  // counts
    if (warp < experts) {
        int before = 0;
        for (int first = 0; first < THREADS; first += LANES) {
            const int own = counts[warp][first + lane];
            int sum = own;
#pragma unroll
            for (int step = 1; step < LANES; step *= 2) {
                const int left = __shfl_up_sync(0xffffffffu, sum, step);
                if (lane >= step) sum += left;
            }
            counts[warp][first + lane] = before + sum - own;
            before += __shfl_sync(0xffffffffu, sum, LANES - 1);
        }
        if (lane == 0) totals[warp] = before;
    }
    __syncthreads();  // totals
    int start = 0;
    for (int e = 0; e < experts; ++e) {
        if (thread == 0) offsets[e] = start;
        counts[e][thread] += start;
        start += totals[e];
    }
    if (thread == 0) offsets[experts] = start;
    for (int64_t row = begin; row < end; ++row) {
        const int place = counts[expert_of(ids[row], experts)][thread]++;
        order[place] = row;
        inverse[row] = place;
    }
}

void route(Tensor offsets, Tensor order, Tensor inverse, const Tensor& ids, int64_t experts) {
    check_sizes(ids, "ids", {FREE});
    const int64_t rows = ids.size(0);
    STD_TORCH_CHECK(rows < INT32_MAX, "ids: expected fewer than 2^31 rows, got ", rows);
    STD_TORCH_CHECK(experts > 0 && experts <= MOST, "experts: expected 1 to ", MOST, ", got ", experts);
    auto* const of = data<int64_t>(ids, "ids", ids, ScalarType::Long, rows);
    auto* const starts = data<int64_t>(offsets, "offsets", ids, ScalarType::Long, experts + 1);
    auto* const places = data<int64_t>(order, "order", ids, ScalarType::Long, rows);
    auto* const back = data<int64_t>(inverse, "inverse", ids, ScalarType::Long, rows);
    const torch::stable::accelerator::DeviceGuard guard(ids.get_device_index());
    route_kernel<<<1, THREADS, 0, current_stream_of(ids)>>>(of, starts, places, back, rows, static_cast<int>(experts));
    check(cudaGetLastError());
}

}  // namespace
}  // namespace mmfuse

STABLE_TORCH_LIBRARY_FRAGMENT(mmfuse_cuda, m) {
    m.def("route(Tensor(a!) offsets, Tensor(b!) order, Tensor(c!) inverse, Tensor ids, int experts) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mmfuse_cuda, CUDA, m) { m.impl("route", TORCH_BOX(&mmfuse::route)); }
