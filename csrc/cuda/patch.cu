// Patches of uint8 pixels as rows of float16, bfloat16 or float32 on a GPU: the first of patch_embed's two kernels.
//
// A thread makes 16 neighbours of a row: one load of 16 bytes where the image's memory allows, stores of 16 bytes
// always. Threads of a block write rows one behind another, whose pixels share sectors in the first-level cache.

#include "launch.h"

#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <torch/csrc/stable/library.h>

namespace mmfuse {
namespace {

constexpr int THREADS = 256, SEGMENT = 16;

struct Three {
    int t, y, x;
};

struct Source {
    Three kernel, step, grid, size;
    int64_t stride_b, stride_c, stride_t, stride_y, stride_x;
    int channels;
    bool channels_last;  // the order of a row: (t, y, x, c) instead of (c, t, y, x)
};

__device__ float rounded(float x, float*) { return x; }
__device__ __half rounded(float x, __half*) { return __float2half_rn(x); }
__device__ __nv_bfloat16 rounded(float x, __nv_bfloat16*) { return __float2bfloat16_rn(x); }

// Where element k of a row lies.
struct Element {
    int c, t, y, x;

    __device__ Element(const Source& s, int k) {
        const int volume = s.kernel.t * s.kernel.y * s.kernel.x;
        const int v = s.channels_last ? k / s.channels : k % volume;
        c = s.channels_last ? k % s.channels : k / volume;
        t = v / (s.kernel.y * s.kernel.x);
        y = v / s.kernel.x % s.kernel.y;
        x = v % s.kernel.x;
    }

    __device__ void next(const Source& s) {
        if (s.channels_last) {
            if (++c < s.channels) return;
            c = 0;
        }
        if (++x < s.kernel.x) return;
        x = 0;
        if (++y < s.kernel.y) return;
        y = 0;
        if (++t < s.kernel.t) return;
        t = 0;
        ++c;
    }

    __device__ int64_t offset(const Source& s) const {
        return c * s.stride_c + t * s.stride_t + y * s.stride_y + x * s.stride_x;
    }
};

// rows [m, kp], zero past k and outside of the image. `order` names the images' computed patches in another order, of which those from `count`
// on are not needed; `ids` are their numbers in the grid; null where every patch is computed, in order.
template <bool VECTORS, class Out>
__global__ void __launch_bounds__(THREADS)
    rows_kernel(Source s, const uint8_t* pixels, const int64_t* order, const int64_t* count, const int64_t* ids,
                const float* subtract, Out* rows, int64_t m, int n, int k, int kp) {
    const int segments = kp / SEGMENT;
    const int64_t index = blockIdx.x * int64_t(THREADS) + threadIdx.x, row = index / segments;
    // a row that is not needed may be a neighbour's in a tile of the product, which discards it
    if (row >= m || (count != nullptr && row >= *count)) return;
    const int first = static_cast<int>(index % segments) * SEGMENT;
    const int64_t token = order ? order[row] : row, image = token / n;
    const int patch = static_cast<int>(ids ? ids[token] : token % n);
    const int t = patch / (s.grid.y * s.grid.x) * s.step.t, y = patch / s.grid.x % s.grid.y * s.step.y;
    const int x = patch % s.grid.x * s.step.x;
    const uint8_t* from = pixels + image * s.stride_b + t * s.stride_t + y * s.stride_y + x * s.stride_x;

    Element e(s, first);
    alignas(16) Out out[SEGMENT];
    if constexpr (VECTORS) {
        union {
            uint4 whole;
            uint8_t at[SEGMENT];
        } in;
        in.whole = __ldg(reinterpret_cast<const uint4*>(from + e.offset(s)));
        int c = e.c;
#pragma unroll
        for (int i = 0; i < SEGMENT; ++i) {
            out[i] = rounded(float(in.at[i]) - (subtract ? __ldg(subtract + c) : 0.0f), static_cast<Out*>(nullptr));
            if (s.channels_last && ++c == s.channels) c = 0;
        }
    } else {
#pragma unroll
        for (int i = 0; i < SEGMENT; ++i) {
            float value = 0;
            if (first + i < k) {
                const bool inside = t + e.t < s.size.t && y + e.y < s.size.y && x + e.x < s.size.x;
                if (inside) value = float(__ldg(from + e.offset(s))) - (subtract ? __ldg(subtract + e.c) : 0.0f);
            }
            out[i] = rounded(value, static_cast<Out*>(nullptr));
            e.next(s);
        }
    }
    auto* to = reinterpret_cast<uint4*>(rows + row * kp + first);
    const auto* made = reinterpret_cast<const uint4*>(out);
#pragma unroll
    for (int i = 0; i < int(sizeof(out) / 16); ++i) to[i] = made[i];
}

// Whether every 16 elements of a row are 16 aligned neighbours in memory.
bool vectors(const Source& s, const void* pixels) {
    const Three &k = s.kernel, &g = s.grid, &p = s.step;
    const bool whole = (g.t - 1) * p.t + k.t <= s.size.t && (g.y - 1) * p.y + k.y <= s.size.y &&
                       (g.x - 1) * p.x + k.x <= s.size.x;
    const bool close = s.channels_last ? s.stride_c == 1 && s.stride_x == s.channels : s.stride_x == 1;
    const int run = s.channels_last ? s.channels * k.x : k.x;
    const int64_t strides = s.stride_b | s.stride_t | s.stride_y | p.x * s.stride_x | (s.channels_last ? 0 : s.stride_c);
    return whole && close && run % SEGMENT == 0 && strides % 16 == 0 && reinterpret_cast<uintptr_t>(pixels) % 16 == 0;
}

void patch_rows(Tensor x, Tensor order, Tensor count, Tensor ids, Tensor subtract, bool channels_last, int64_t kt,
                int64_t ky, int64_t kx, int64_t st, int64_t sy, int64_t sx, int64_t gt, int64_t gy, int64_t gx,
                int64_t n, Tensor rows) {
    STD_TORCH_CHECK(x.dim() == 5 && x.scalar_type() == ScalarType::Byte, "x: expected uint8 of 5 dimensions");
    STD_TORCH_CHECK(rows.dim() == 2 && rows.is_contiguous() && rows.size(1) % SEGMENT == 0,
                    "rows: expected [m, k], k a multiple of ", SEGMENT);
    const auto three = [](int64_t t, int64_t y, int64_t x) { return Three{int(t), int(y), int(x)}; };
    const Source s{three(kt, ky, kx), three(st, sy, sx), three(gt, gy, gx), three(x.size(2), x.size(3), x.size(4)),
                   x.stride(0), x.stride(1), x.stride(2), x.stride(3), x.stride(4), int(x.size(1)), channels_last};
    const int64_t m = rows.size(0), kp = rows.size(1), k = product({x.size(1), kt, ky, kx}, "kt, ky, kx");
    STD_TORCH_CHECK(k <= kp && kp <= INT32_MAX, "rows: expected at least ", k, " columns, got ", kp);
    STD_TORCH_CHECK(product({gt, gy, gx}, "gt, gy, gx") <= INT32_MAX && n > 0 && n <= INT32_MAX && st > 0 && sy > 0 && sx > 0,
                    "gt, gy, gx, n, st, sy, sx: expected numbers from 1 on, and less than 2^31 patches");
    for (int d = 2; d < 5; ++d) {
        const int64_t grid[] = {gt, gy, gx}, step[] = {st, sy, sx}, size = x.size(d);
        STD_TORCH_CHECK(size <= INT32_MAX && grid[d - 2] - 1 <= (size - 1) / step[d - 2] && step[d - 2] <= INT32_MAX,
                        "st, sy, sx: patches ", step[d - 2], " apart do not begin within ", size, " pixels");
    }
    STD_TORCH_CHECK(m == 0 || x.size(0) > 0, "x: expected an image");
    STD_TORCH_CHECK(order.numel() > 0 || m <= x.size(0) * n, "rows: expected at most the ", x.size(0) * n, " patches");
    STD_TORCH_CHECK(same_device(rows, x), "rows: expected the device of x");
    const int64_t* at = optional_data<int64_t>(order, "order", x, ScalarType::Long, m);
    const int64_t* kept = optional_data<int64_t>(count, "count", x, ScalarType::Long, 1);
    const int64_t* numbers = optional_data<int64_t>(ids, "ids", x, ScalarType::Long, x.size(0) * n);
    const float* less = optional_data<float>(subtract, "subtract", x, ScalarType::Float, x.size(1));
    const auto* pixels = static_cast<const uint8_t*>(x.data_ptr());
    if (m == 0) return;

    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    const auto blocks = static_cast<unsigned>(ceil_div(m * (kp / SEGMENT), THREADS));
    const auto run = [&]<class Out>(Out*) {
        const auto kernel = k == kp && vectors(s, pixels) ? rows_kernel<true, Out> : rows_kernel<false, Out>;
        kernel<<<blocks, THREADS, 0, current_stream_of(x)>>>(
            s, pixels, at, kept, numbers, less, static_cast<Out*>(rows.data_ptr()), m, int(n), int(k), int(kp));
    };
    switch (rows.scalar_type()) {
        case ScalarType::Half: run(static_cast<__half*>(nullptr)); break;
        case ScalarType::BFloat16: run(static_cast<__nv_bfloat16*>(nullptr)); break;
        case ScalarType::Float: run(static_cast<float*>(nullptr)); break;
        default: STD_TORCH_CHECK(false, "rows: expected float16, bfloat16 or float32");
    }
    check(cudaGetLastError());
}

}  // namespace
}  // namespace mmfuse

STABLE_TORCH_LIBRARY_FRAGMENT(mmfuse_cuda, m) {
    m.def(
        "patch_rows(Tensor x, Tensor order, Tensor count, Tensor ids, Tensor subtract, bool channels_last, "
        "int kt, int ky, int kx, int st, int sy, int sx, int gt, int gy, int gx, int n, Tensor(a!) rows) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mmfuse_cuda, CUDA, m) { m.impl("patch_rows", TORCH_BOX(&mmfuse::patch_rows)); }
