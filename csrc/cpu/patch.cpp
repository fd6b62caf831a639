// Patches of uint8 or float pixels as rows of float32 on the CPU, by any strides: what the product of patch_embed reads.
//
// A row is written in order, from pieces of the image that are contiguous where its memory is: 16 pixels at a time.

#include "../tensor.h"
#include "simd.h"

#include <algorithm>
#include <array>
#include <type_traits>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

namespace mmfuse {
namespace {

using Three = std::array<int64_t, 3>;  // over (t, y, x)

struct Source {
    Three kernel, step, grid, size, stride;
    int64_t batch_stride, channel_stride, channels;
    bool channels_last;  // the order of a row: (t, y, x, c) instead of (c, t, y, x)
};

// A row is `offset.size()` runs of `length` pixels, `step` apart in memory.
struct Runs {
    std::vector<int64_t> offset;
    int64_t length, step;
};

Runs runs_of(const Source& s) {
    const auto [kt, ky, kx] = s.kernel;
    Runs runs{{}, kx, s.stride[2]};
    if (!s.channels_last) {
        for (int64_t c = 0; c < s.channels; ++c)
            for (int64_t t = 0; t < kt; ++t)
                for (int64_t y = 0; y < ky; ++y)
                    runs.offset.push_back(c * s.channel_stride + t * s.stride[0] + y * s.stride[1]);
        return runs;
    }
    // the pixels of a line lie behind one another, with their channels
    const bool lines = s.stride[2] == s.channels * s.channel_stride || kx == 1;
    runs.length = s.channels * (lines ? kx : 1);
    runs.step = s.channel_stride;
    for (int64_t t = 0; t < kt; ++t)
        for (int64_t y = 0; y < ky; ++y)
            for (int64_t x = 0; x < (lines ? 1 : kx); ++x)
                runs.offset.push_back(t * s.stride[0] + y * s.stride[1] + x * s.stride[2]);
    return runs;
}

template <class T>
MMFUSE_INLINE float enter(T pixel, float subtract, float multiply) {
    const float x = static_cast<float>(pixel) - subtract;
    return std::is_same_v<T, uint8_t> ? x : x * multiply;
}

// LENGTH: what a run's length is known to be, 0 if unknown; CLOSE: its pixels are neighbours
template <int LENGTH, bool CLOSE, class T>
MMFUSE_INLINE void fill(const T* patch, const Runs& runs, const float* subtract, const float* multiply, float* row) {
    const int64_t length = LENGTH ? LENGTH : runs.length, step = CLOSE ? 1 : runs.step;
    for (const int64_t offset : runs.offset) {
        const T* from = patch + offset;
#pragma omp simd
        for (int64_t x = 0; x < length; ++x) row[x] = enter(from[x * step], subtract[x], multiply[x]);
        row += length;
        subtract += length;
        multiply += length;
    }
}

template <class T>
MMFUSE_INLINE void any_row(const T* patch, const Runs& runs, const float* subtract, const float* multiply, float* row) {
    if (runs.step != 1) return fill<0, false>(patch, runs, subtract, multiply, row);
    switch (runs.length) {
        case 14: return fill<14, true>(patch, runs, subtract, multiply, row);
        case 16: return fill<16, true>(patch, runs, subtract, multiply, row);
        case 32: return fill<32, true>(patch, runs, subtract, multiply, row);
        default: return fill<0, true>(patch, runs, subtract, multiply, row);
    }
}

MMFUSE_CLONES
void write_row(const uint8_t* patch, const Runs& runs, const float* subtract, const float* multiply, float* row) {
    any_row(patch, runs, subtract, multiply, row);
}

MMFUSE_CLONES
void write_row(const float* patch, const Runs& runs, const float* subtract, const float* multiply, float* row) {
    any_row(patch, runs, subtract, multiply, row);
}

// A patch that leaves the image, element by element: zeros are outside.
template <class T>
void write_edge(const T* patch, const Source& s, const Three& at, const float* subtract, const float* multiply,
                float* row) {
    const int64_t c_outer = s.channels_last ? 1 : s.channels, c_inner = s.channels_last ? s.channels : 1;
    int64_t k = 0;
    for (int64_t outer = 0; outer < c_outer; ++outer)
        for (int64_t t = 0; t < s.kernel[0]; ++t)
            for (int64_t y = 0; y < s.kernel[1]; ++y)
                for (int64_t x = 0; x < s.kernel[2]; ++x)
                    for (int64_t inner = 0; inner < c_inner; ++inner, ++k) {
                        const int64_t c = outer + inner;
                        const bool inside = at[0] + t < s.size[0] && at[1] + y < s.size[1] && at[2] + x < s.size[2];
                        const T* from = patch + c * s.channel_stride + t * s.stride[0] + y * s.stride[1];
                        row[k] = inside ? enter(from[x * s.stride[2]], subtract[k], multiply[k]) : 0.0f;
                    }
}

// [C] as one value of each element of a row
std::vector<float> over_row(const float* values, float missing, const Source& s) {
    const int64_t volume = s.kernel[0] * s.kernel[1] * s.kernel[2];
    std::vector<float> row(s.channels * volume, missing);
    if (values)
        for (int64_t k = 0; k < s.channels * volume; ++k)
            row[k] = values[s.channels_last ? k % s.channels : k / volume];
    return row;
}

template <class T>
void write_rows(const T* pixels, const Source& s, const int64_t* tokens, int64_t count, const float* subtract,
                const float* multiply, float* out, int64_t image_stride) {
    const Runs runs = runs_of(s);
    const auto [gt, gy, gx] = s.grid;
    const int64_t patches = gt * gy * gx, k = s.channels * s.kernel[0] * s.kernel[1] * s.kernel[2];
    const std::vector<float> less = over_row(subtract, 0, s), times = over_row(multiply, 1, s);
    torch::stable::parallel_for(0, count, ceil_div(16384, k), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t token = tokens ? tokens[i] : i, image = token / patches, n = token % patches;
            const Three at{n / (gy * gx) * s.step[0], n / gx % gy * s.step[1], n % gx * s.step[2]};
            const T* patch = pixels + image * s.batch_stride;
            bool inside = true;
            for (int d = 0; d < 3; ++d) {
                patch += at[d] * s.stride[d];
                inside &= at[d] + s.kernel[d] <= s.size[d];
            }
            float* row = tokens ? out + i * k : out + image * image_stride + n * k;
            if (inside)
                write_row(patch, runs, less.data(), times.data(), row);
            else
                write_edge(patch, s, at, less.data(), times.data(), row);
        }
    });
}

// x [m, C, T, H, W] by its strides, uint8 or float32; rows [m, N, K] of all patches or, of those at `tokens` (image N +
// patch), [count, K]. subtract and multiply have a value of each channel or none.
void patch_rows(Tensor x, Tensor tokens, Tensor subtract, Tensor multiply, bool channels_last, int64_t kt, int64_t ky,
                int64_t kx, int64_t st, int64_t sy, int64_t sx, int64_t gt, int64_t gy, int64_t gx,
                Tensor rows) {
    STD_TORCH_CHECK(x.dim() == 5 && x.size(1) > 0, "x: expected 5 dimensions, the second of channels");
    const Source s{{kt, ky, kx},
                   {st, sy, sx},
                   {gt, gy, gx},
                   {x.size(2), x.size(3), x.size(4)},
                   {x.stride(2), x.stride(3), x.stride(4)},
                   x.stride(0),
                   x.stride(1),
                   x.size(1),
                   channels_last};
    const int64_t m = x.size(0), n = product({gt, gy, gx}, "gt, gy, gx"), k = product({x.size(1), kt, ky, kx}, "kt, ky, kx");
    product({m + 1, n}, "gt, gy, gx");
    const char* const over[3] = {"st: of time", "sy: of rows", "sx: of columns"};
    for (int d = 0; d < 3; ++d)  // the last patch may be zeros alone, the one before it begins inside of the image
        STD_TORCH_CHECK(s.step[d] > 0 && s.step[d] <= INT32_MAX && s.grid[d] - 2 <= (s.size[d] - 1) / s.step[d],
                        over[d], ": ", s.grid[d],
                        " patches ", s.step[d], " apart do not begin within ", s.size[d], " pixels");
    const bool some = rows.dim() == 2;
    if (some)
        check_sizes(rows, "rows", {FREE, k});
    else
        check_sizes(rows, "rows", {m, n, k});
    const int64_t count = some ? rows.size(0) : m * n;
    STD_TORCH_CHECK(rows.scalar_type() == ScalarType::Float && rows.stride(rows.dim() - 1) == 1 &&
                        rows.stride(rows.dim() - 2) == k,
                    "rows: expected float32 rows of ", k, " one behind another");
    for (const Tensor& t : {x, rows})
        STD_TORCH_CHECK(t.is_cpu() && (t.numel() == 0 || t.data_ptr() != nullptr), "x, rows: expected memory of a CPU");
    const int64_t* at = some ? data<int64_t>(tokens, "tokens", x, ScalarType::Long, count) : nullptr;
    STD_TORCH_CHECK(!some || std::all_of(at, at + count, [&](int64_t i) { return i >= 0 && i < m * n; }),
                    "tokens: expected indices of the ", m * n, " patches");
    const float* less = optional_data<float>(subtract, "subtract", x, ScalarType::Float, s.channels);
    const float* times = optional_data<float>(multiply, "multiply", x, ScalarType::Float, s.channels);
    float* out = static_cast<float*>(rows.data_ptr());
    if (count == 0) return;
    const int64_t image_stride = some ? 0 : rows.stride(0);
    if (x.scalar_type() == ScalarType::Byte)
        write_rows(static_cast<const uint8_t*>(x.data_ptr()), s, at, count, less, times, out, image_stride);
    else if (x.scalar_type() == ScalarType::Float)
        write_rows(static_cast<const float*>(x.data_ptr()), s, at, count, less, times, out, image_stride);
    else
        STD_TORCH_CHECK(false, "x: expected uint8 or float32, got type ", int(x.scalar_type()));
}

}  // namespace
}  // namespace mmfuse

STABLE_TORCH_LIBRARY_FRAGMENT(mmfuse_cpu, m) {
    m.def(
        "patch_rows(Tensor x, Tensor tokens, Tensor subtract, Tensor multiply, bool channels_last, int kt, int ky, "
        " int kx, int st, int sy, int sx, int gt, int gy, int gx, Tensor(a!) rows) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mmfuse_cpu, CPU, m) { m.impl("patch_rows", TORCH_BOX(&mmfuse::patch_rows)); }
