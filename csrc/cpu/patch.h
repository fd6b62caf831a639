// Patches of uint8 or float pixels as rows of float32 on the CPU, by any strides, for any runtime's threads: what the product of patch_embed reads.
//
// A row is written in order, from pieces of the image that are contiguous where its memory is: 16 pixels at a time.

#pragma once

#include "../checks.h"
#include "simd.h"

#include <algorithm>
#include <array>
#include <type_traits>
#include <vector>

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

template <class T, class Parallel>
void write_rows(const T* pixels, const Source& s, const int64_t* tokens, int64_t count, const float* subtract,
                const float* multiply, float* out, int64_t image_stride, const Parallel& parallel) {
    const Runs runs = runs_of(s);
    const auto [gt, gy, gx] = s.grid;
    const int64_t patches = gt * gy * gx, k = s.channels * s.kernel[0] * s.kernel[1] * s.kernel[2];
    const std::vector<float> less = over_row(subtract, 0, s), times = over_row(multiply, 1, s);
    parallel(0, count, ceil_div(16384, k), [&](int64_t begin, int64_t end) {
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

}  // namespace
}  // namespace mmfuse
