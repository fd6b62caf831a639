// Patches of pixels as rows of float32 on the CPU, of torch's tensors.

#include "patch.h"
#include "threads.h"

#include <algorithm>

#include <torch/csrc/stable/library.h>

namespace mmfuse {
namespace {

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
        write_rows(static_cast<const uint8_t*>(x.data_ptr()), s, at, count, less, times, out, image_stride, OF_TORCH);
    else if (x.scalar_type() == ScalarType::Float)
        write_rows(static_cast<const float*>(x.data_ptr()), s, at, count, less, times, out, image_stride, OF_TORCH);
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
