// Products of float32 matrices, or of bfloat16 with a result of float32, on a CPU with vectors of 512 bits.
//
//     out[h] = a[h] b[h]^T + bias,   or added to out[h]
//
// A tile of out stays in registers. Of many rows, b is packed a few panels at a time (packed.h); of a few it is read as it
// lies: then sums are of at most DEEP numbers, in 16 parts. Blocks of sums are added up in order, and no number of threads
// changes a bit.

#include "../tensor.h"
#include "packed.h"
#include "simd.h"
#include "threads.h"

#include <algorithm>
#include <memory>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

namespace mmfuse {
namespace {

constexpr int64_t LANES = 16;
constexpr int64_t DEEP = 768;
constexpr int64_t ROWS = 8;  // of a, that deep in the first-level cache beside a tile's of b

typedef float Vector __attribute__((vector_size(64), aligned(4), may_alias));
typedef float Half __attribute__((vector_size(32)));
typedef float Quarter __attribute__((vector_size(16)));

#if __has_builtin(__builtin_shufflevector)
MMFUSE_INLINE Half half(const Vector& x) {
    return __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) +
           __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
}

MMFUSE_INLINE Half quarters(const Half& x, const Half& y) {
    return __builtin_shufflevector(x, y, 0, 1, 2, 3, 8, 9, 10, 11) +
           __builtin_shufflevector(x, y, 4, 5, 6, 7, 12, 13, 14, 15);
}

// the sums of four vectors
MMFUSE_INLINE Quarter sums(const Vector& a, const Vector& b, const Vector& c, const Vector& d) {
    const Half ab = quarters(half(a), half(b)), cd = quarters(half(c), half(d));
    const Half pairs = __builtin_shufflevector(ab, cd, 0, 1, 8, 9, 4, 5, 12, 13) +
                       __builtin_shufflevector(ab, cd, 2, 3, 10, 11, 6, 7, 14, 15);  // a a c c b b d d
    return __builtin_shufflevector(pairs, pairs, 0, 4, 2, 6) + __builtin_shufflevector(pairs, pairs, 1, 5, 3, 7);
}
#else  // g++ 11
MMFUSE_INLINE Quarter sums(const Vector& a, const Vector& b, const Vector& c, const Vector& d) {
    Quarter s[4] = {};  // of every fourth number
#pragma GCC unroll 16
    for (int l = 0; l < LANES; ++l) s[l % 4] += Quarter{a[l], b[l], c[l], d[l]};
    return (s[0] + s[1]) + (s[2] + s[3]);
}
#endif

struct Matrix {
    float* at;
    int64_t stride;  // of rows
};

// c [R, S] = or += a [R, k] b^T [k, S], R <= 4, features of unit stride
template <int R, int S>
MMFUSE_INLINE void dots(Matrix c, Matrix a, Matrix b, int64_t k, const float* bias, bool adds) {
    Vector sum[R][S] = {};
    int64_t e = 0;
    for (; e + LANES <= k; e += LANES) {
        Vector x[R];
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i) x[i] = *reinterpret_cast<const Vector*>(a.at + i * a.stride + e);
#pragma GCC unroll 8
        for (int j = 0; j < S; ++j) {
            const Vector y = *reinterpret_cast<const Vector*>(b.at + j * b.stride + e);
#pragma GCC unroll 8
            for (int i = 0; i < R; ++i) sum[i][j] += x[i] * y;
        }
    }
#pragma GCC unroll 8
    for (int j = 0; j < S; ++j) {
        Quarter s = sums(sum[0][j], sum[R > 1][j], sum[R > 2 ? 2 : 0][j], sum[R > 3 ? 3 : 0][j]);
        for (int64_t l = e; l < k; ++l)
            for (int i = 0; i < R; ++i) s[i] += a.at[i * a.stride + l] * b.at[j * b.stride + l];
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i) {
            float& to = c.at[i * c.stride + j];
            to = adds ? to + s[i] : bias ? bias[j] + s[i] : s[i];
        }
    }
}

MMFUSE_INLINE Matrix part(Matrix m, int64_t row, int64_t column) { return {m.at + row * m.stride + column, m.stride}; }

template <int R, int S>
MMFUSE_INLINE void rows_of_dots(Matrix c, Matrix a, Matrix b, int64_t rows, int64_t k, const float* bias, bool adds) {
    int64_t i = 0;
    for (; i + R <= rows; i += R) dots<R, S>(part(c, i, 0), part(a, i, 0), b, k, bias, adds);
    for (; i < rows; ++i) dots<1, S>(part(c, i, 0), part(a, i, 0), b, k, bias, adds);
}

template <int R, int S>
MMFUSE_INLINE void all_dots(Matrix c, Matrix a, Matrix b, int64_t rows, int64_t n, int64_t k, const float* bias,
                            bool adds) {
    int64_t j = 0;
    for (; j + S <= n; j += S)
        rows_of_dots<R, S>(part(c, 0, j), a, part(b, j, 0), rows, k, bias ? bias + j : nullptr, adds);
    for (; j < n; ++j) rows_of_dots<R, 1>(part(c, 0, j), a, part(b, j, 0), rows, k, bias ? bias + j : nullptr, adds);
}

// c [rows, n] of one matrix
MMFUSE_CLONES
void multiply(Matrix c, Matrix a, Matrix b, int64_t rows, int64_t n, int64_t k, const float* bias, bool adds) {
    for (int64_t e = 0; e < std::max<int64_t>(k, 1); e += DEEP)
        for (int64_t i = 0; i < rows; i += ROWS)
            all_dots<4, 6>(part(c, i, 0), part(a, i, e), part(b, 0, e), std::min(ROWS, rows - i), n,
                           std::min(DEEP, k - e), bias, adds || e > 0);
}

template <class T>
T* numbers_of(const Tensor& t, const char* name, ScalarType dtype) {
    STD_TORCH_CHECK(t.scalar_type() == dtype && !t.is_cuda(), name, ": expected float32 on a CPU, or bfloat16 as a and b");
    STD_TORCH_CHECK(t.numel() == 0 || t.data_ptr() != nullptr, name, ": expected memory, got none");
    return static_cast<T*>(t.data_ptr());
}

// of a and b with any strides: a panel's part of b is packed where it stays in the cache, and of a what is not of unit stride
template <class T>
void packed(const Tensor& a, const Tensor& b, const float* bias, const Tensor& out, bool adds, ScalarType dtype) {
    const int64_t heads = a.size(0), rows = a.size(1), k = a.size(2), n = b.size(1);
    const T *from = numbers_of<T>(a, "a", dtype), *of = numbers_of<T>(b, "b", dtype);
    float* to = numbers_of<float>(out, "out", ScalarType::Float);
    // out is read and written again after every PARTS sums of DEEP features
    constexpr int64_t PANELS = 3, PARTS = 3, LINES = DEPTH / 2, DEEP = LINES * PackedLine<T>::FEATURES;
    // panels that a thread takes at once: groups alike, and as many of them for each thread
    const int64_t panels = ceil_div(n, COLUMNS), threads = torch::stable::get_num_threads();
    const int64_t groups = std::min(panels, threads * ceil_div(panels, PANELS * threads)), some = ceil_div(panels, groups);
    const int64_t height = 6 * ceil_div(rows, 6 * ceil_div(rows, ROWS_AT_ONCE));  // of whole tiles
    const int64_t grain = ceil_div(1 << 19, rows * (k + 1) * some * COLUMNS);
    torch::stable::parallel_for(0, heads * groups, grain, [&](int64_t begin, int64_t end) {
        const std::unique_ptr<PackedLine<T>[]> lines(new PackedLine<T>[PARTS * PANELS * LINES]);
        const std::unique_ptr<T[]> dense(k <= 1 || a.stride(2) == 1 ? nullptr : new T[ROWS_AT_ONCE * DEEP]);
        const auto line = [&](int64_t part, int64_t panel) { return &lines[(part * PANELS + panel) * LINES]; };
        for (int64_t t = begin; t < end; ++t) {
            const int64_t h = t / groups, at = t % groups, first = at * panels / groups, last = (at + 1) * panels / groups;
            for (int64_t e0 = 0; e0 < std::max<int64_t>(k, 1); e0 += PARTS * DEEP) {
                const int64_t parts = std::max<int64_t>(1, std::min(PARTS, ceil_div(k - e0, DEEP)));
                for (int64_t q = 0; q < parts; ++q)
                    for (int64_t p = first; p < last; ++p)
                        pack(of + h * b.stride(0) + p * COLUMNS * b.stride(1) + (e0 + q * DEEP) * b.stride(2), b.stride(1),
                             b.stride(2), std::min(COLUMNS, n - p * COLUMNS), std::min(DEEP, k - e0 - q * DEEP),
                             line(q, p - first));
                for (int64_t i = 0; i < rows; i += height)
                    for (int64_t q = 0; q < parts; ++q) {
                        const int64_t count = std::min(height, rows - i), e = e0 + q * DEEP, deep = std::min(DEEP, k - e);
                        const T* x = from + h * a.stride(0) + i * a.stride(1) + e * a.stride(2);
                        if (dense) transposed(x, a.stride(2), a.stride(1), deep, count, dense.get(), DEEP);
                        for (int64_t p = first; p < last; ++p) {
                            const int64_t width = std::min(COLUMNS, n - p * COLUMNS);
                            PackedLine<float> add{};
                            if (bias) std::copy_n(bias + p * COLUMNS, width, add.x[0]);
                            rows_of_panel(dense ? dense.get() : x, dense ? DEEP : a.stride(1), count, line(q, p - first), deep,
                                          to + h * out.stride(0) + i * out.stride(1) + p * COLUMNS, out.stride(1), width,
                                          add.x[0], adds || e > 0);
                        }
                    }
            }
        }
    });
}

void as_it_lies(const Tensor& a, const Tensor& b, const float* add, const Tensor& out, bool adds) {
    const int64_t heads = a.size(0), rows = a.size(1), k = a.size(2), n = b.size(1);
    const Matrix from{numbers_of<float>(a, "a", ScalarType::Float), a.stride(1)};
    const Matrix to{numbers_of<float>(out, "out", ScalarType::Float), out.stride(1)};
    const Matrix of{numbers_of<float>(b, "b", ScalarType::Float), b.stride(1)};
    // columns of a matrix that a thread takes at once: at most WIDE, in tiles of 6, as many for each thread
    constexpr int64_t WIDE = 192;
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t width = 6 * ceil_div(n, 6 * threads * ceil_div(n, WIDE * threads)), tiles = ceil_div(n, width);
    const int64_t grain = ceil_div(1 << 19, rows * (k + 1) * width);
    torch::stable::parallel_for(0, heads * tiles, grain, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
            const int64_t h = t / tiles, j = t % tiles * width;
            const Matrix c{to.at + h * out.stride(0) + j, to.stride}, x{from.at + h * a.stride(0), from.stride};
            const Matrix y{of.at + h * b.stride(0) + j * of.stride, of.stride};
            multiply(c, x, y, rows, std::min(width, n - j), k, add ? add + j : nullptr, adds);
        }
    });
}

// a [H, M, K], b [H, N, K], bias [N], out [H, M, N]; `adds` to out, without a bias
void products(const Tensor& a, const Tensor& b, const std::optional<Tensor>& bias, Tensor out, bool adds) {
    check_sizes(a, "a", {FREE, FREE, FREE});
    check_sizes(b, "b", {a.size(0), FREE, a.size(2)});
    check_sizes(out, "out", {a.size(0), a.size(1), b.size(1)});
    const auto unit = [](const Tensor& t) { return t.size(t.dim() - 1) <= 1 || t.stride(t.dim() - 1) == 1; };
    STD_TORCH_CHECK(unit(out), "out: expected a unit stride of the last dimension");
    if (bias) check_sizes(*bias, "bias", {b.size(1)});
    STD_TORCH_CHECK(!bias || (unit(*bias) && !adds), "bias: expected a unit stride, and none beside what is added to");
    const float* add = bias ? numbers_of<float>(*bias, "bias", ScalarType::Float) : nullptr;
    if (out.numel() == 0) return;
    if (a.scalar_type() != ScalarType::BFloat16) {
        // to pack takes longer than the products of few rows, and to add up vectors longer than those of few features
        const bool few = a.size(1) < ROWS_AT_ONCE && a.size(2) >= 256;
        return few && unit(a) && unit(b) ? as_it_lies(a, b, add, out, adds) : packed<float>(a, b, add, out, adds, ScalarType::Float);
    }
#ifdef MMFUSE_HAS_PAIRS
    STD_TORCH_CHECK(__builtin_cpu_supports("avx512bf16"), "a: expected float32 on this CPU, got bfloat16");
    STD_TORCH_CHECK(unit(a), "a: expected a unit stride of the last dimension of bfloat16");
    packed<Bfloat16>(a, b, add, out, adds, ScalarType::BFloat16);
#else
    STD_TORCH_CHECK(false, "a: expected float32 in this build, got bfloat16");
#endif
}

}  // namespace
}  // namespace mmfuse

STABLE_TORCH_LIBRARY_FRAGMENT(mmfuse_cpu, m) {
    m.def("products(Tensor a, Tensor b, Tensor? bias, Tensor(a!) out, bool adds) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mmfuse_cpu, CPU, m) { m.impl("products", TORCH_BOX(&mmfuse::products)); }
