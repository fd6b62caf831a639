// Point clouds on the CPU: farthest-point sampling, nearest neighbours, ball query and the gradient of grouping.
//
// Squared distances are (x - x')^2 + (y - y')^2 + (z - z')^2 in float32, each operation rounded, as in plain torch: every
// implementation finds the same indices. Coordinates come as [B, 3, N]. The number of threads does not change a bit.

// no fused multiply-add, which only some of the clones would have
#pragma GCC optimize("fp-contract=off")

#include "../tensor.h"
#include "simd.h"

#include <algorithm>
#include <bit>
#include <limits>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

namespace mmfuse {
namespace {

constexpr float INF = std::numeric_limits<float>::infinity();
constexpr int64_t PART = 256;  // points whose largest distance is known before the farthest is looked for
constexpr int64_t LANES = 256, BLOCK = 32 * LANES;  // smallest distances that are known, and points at a time
constexpr int64_t STEP = 64;  // points of a ball query at a time

struct Point {
    float x, y, z;

    // to points [3, N]
    MMFUSE_INLINE float squared_distance(const float* p, int64_t n, int64_t j) const {
        const float dx = p[j] - x, dy = p[n + j] - y, dz = p[2 * n + j] - z;
        return dx * dx + dy * dy + dz * dz;
    }
};

Point point_of(const float* p, int64_t n, int64_t j) { return {p[j], p[n + j], p[2 * n + j]}; }

// ---------------------------------------------------------------------------------------------------------------
// farthest_points

// One step: distances to `last` enter the running minima. Returns the first point of the largest minimum.
MMFUSE_CLONES
int64_t farthest(const float* p, int64_t n, Point last, float* least) {
    float best = -INF;
    int64_t part = 0;
    for (int64_t begin = 0; begin < n; begin += PART) {
        const int64_t end = std::min(begin + PART, n);
        float largest = -INF;
#pragma omp simd reduction(max : largest)
        for (int64_t j = begin; j < end; ++j) {
            const float d = last.squared_distance(p, n, j), m = least[j];
            const float smaller = d < m ? d : m;  // a NaN changes nothing
            least[j] = smaller;
            largest = smaller > largest ? smaller : largest;
        }
        if (largest > best) best = largest, part = begin;
    }
    const int64_t end = std::min(part + PART, n);
    const float* at = std::find(least + part, least + end, best);
    return at == least + end ? 0 : at - least;
}

void farthest_points(Tensor points, Tensor start, Tensor index) {
    check_sizes(points, "points", {FREE, 3, FREE});
    const int64_t b = points.size(0), n = points.size(2);
    check_sizes(index, "index", {b, FREE});
    const int64_t k = index.size(1);
    const float* p = floats(points, "points", points, b * 3 * n);
    const int64_t* first = data<int64_t>(start, "start", points, ScalarType::Long, b);
    int64_t* out = data<int64_t>(index, "index", points, ScalarType::Long, b * k);
    for (int64_t i = 0; i < b; ++i)
        STD_TORCH_CHECK(first[i] >= 0 && first[i] < n, "start: expected indices of the ", n, " points of a cloud, got ",
                        first[i]);

    torch::stable::parallel_for(0, b, 1, [&](int64_t begin, int64_t end) {
        std::vector<float> least(n);
        for (int64_t i = begin; i < end; ++i) {
            const float* cloud = p + i * 3 * n;
            // a point that is not finite has no distances: it comes last
            for (int64_t j = 0; j < n; ++j) {
                const Point q = point_of(cloud, n, j);
                least[j] = q.squared_distance(cloud, n, j) == 0 ? INF : -INF;
            }
            int64_t last = first[i];
            for (int64_t step = 0; step < k; ++step) {
                out[i * k + step] = last;
                if (step + 1 < k) last = farthest(cloud, n, point_of(cloud, n, last), least.data());
            }
        }
    });
}

// ---------------------------------------------------------------------------------------------------------------
// nearest_neighbors

MMFUSE_CLONES
void squared_distances(const float* p, int64_t n, int64_t begin, int64_t count, Point q, float* d) {
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) {
        const float x = q.squared_distance(p, n, begin + j);
        d[j] = x == x ? x : INF;
    }
}

// The distances of up to BLOCK points, and the smallest of those that are LANES apart.
MMFUSE_CLONES
void distances_and_least(const float* p, int64_t n, int64_t begin, int64_t count, Point q, float* d, float* least) {
    std::fill_n(least, LANES, INF);
    for (int64_t first = 0; first < count; first += LANES) {
        const int64_t lanes = std::min(LANES, count - first);
#pragma omp simd
        for (int64_t j = 0; j < lanes; ++j) {
            float x = q.squared_distance(p, n, begin + first + j);
            x = x == x ? x : INF;
            d[first + j] = x;
            least[j] = x < least[j] ? x : least[j];
        }
    }
}

// A number that k of the lanes do not exceed, near the smallest there is: by bisection of the bits of numbers >= 0.
MMFUSE_CLONES
float bound_of(const float* least, int64_t k) {
    int32_t low = -1, high = std::bit_cast<int32_t>(INF);
    while (k <= LANES && high - low > 1) {
        const int32_t middle = low + (high - low) / 2;
        const float x = std::bit_cast<float>(middle);
        int32_t count = 0;
#pragma omp simd reduction(+ : count)
        for (int64_t j = 0; j < LANES; ++j) count += least[j] <= x;
        if (count < k) {
            low = middle;
        } else {
            high = middle;
            if (count == k) break;
        }
    }
    return std::bit_cast<float>(high);
}

// orders points by distance, then by index
uint64_t key_of(float d, int64_t j) { return uint64_t(std::bit_cast<uint32_t>(d)) << 32 | uint64_t(j); }

void nearest_neighbors(Tensor query, Tensor points, Tensor index) {
    check_sizes(points, "points", {FREE, 3, FREE});
    const int64_t b = points.size(0), n = points.size(2);
    check_sizes(query, "query", {b, 3, FREE});
    const int64_t g = query.size(2);
    check_sizes(index, "index", {b, g, FREE});
    const int64_t k = index.size(2);
    STD_TORCH_CHECK(n < (int64_t(1) << 32) && k > 0 && k <= n, "index: expected 1 to ", n,
                    " neighbours, of less than 2^32 points, got ", k);
    const float* p = floats(points, "points", points, b * 3 * n);
    const float* q = floats(query, "query", points, b * 3 * g);
    int64_t* out = data<int64_t>(index, "index", points, ScalarType::Long, b * g * k);

    torch::stable::parallel_for(0, b * g, ceil_div(65536, n + 1), [&](int64_t begin, int64_t end) {
        std::vector<uint64_t> nearest(k + BLOCK);
        float d[BLOCK], least[LANES];
        for (int64_t i = begin; i < end; ++i) {
            const float* cloud = p + i / g * 3 * n;
            const Point centre = point_of(q + i / g * 3 * g, g, i % g);
            int64_t found = 0;
            for (int64_t block = 0; block < n; block += BLOCK) {
                const int64_t count = std::min(BLOCK, n - block);
                distances_and_least(cloud, n, block, count, centre, d, least);
                // k lanes have a point within the bound: what is farther is not among the k nearest
                const float bound = bound_of(least, k);
                const uint64_t last = found < k ? ~uint64_t(0) : nearest[k - 1];
                int64_t candidates = found;
                for (int64_t lane = 0; lane < std::min(LANES, count); ++lane) {
                    if (least[lane] > bound) continue;
                    for (int64_t j = lane; j < count; j += LANES) {
                        const uint64_t key = key_of(d[j], block + j);
                        if (d[j] <= bound && key < last) nearest[candidates++] = key;
                    }
                }
                found = std::min(k, candidates);
                std::partial_sort(nearest.begin(), nearest.begin() + found, nearest.begin() + candidates);
            }
            for (int64_t j = 0; j < k; ++j) out[i * k + j] = int64_t(uint32_t(nearest[j]));
        }
    });
}

// ---------------------------------------------------------------------------------------------------------------
// ball_query

void ball_query(Tensor query, Tensor points, double radius, Tensor index) {
    check_sizes(points, "points", {FREE, 3, FREE});
    const int64_t b = points.size(0), n = points.size(2);
    check_sizes(query, "query", {b, 3, FREE});
    const int64_t g = query.size(2);
    check_sizes(index, "index", {b, g, FREE});
    const int64_t k = index.size(2);
    STD_TORCH_CHECK(n > 0, "points: expected at least one in a cloud");
    const float* p = floats(points, "points", points, b * 3 * n);
    const float* q = floats(query, "query", points, b * 3 * g);
    int64_t* out = data<int64_t>(index, "index", points, ScalarType::Long, b * g * k);
    const float limit = float(radius) * float(radius);

    torch::stable::parallel_for(0, b * g, ceil_div(65536, n + 1), [&](int64_t begin, int64_t end) {
        float d[STEP];
        for (int64_t i = begin; i < end; ++i) {
            const float* cloud = p + i / g * 3 * n;
            const Point centre = point_of(q + i / g * 3 * g, g, i % g);
            int64_t* row = out + i * k;
            int64_t found = 0;
            for (int64_t block = 0; block < n && found < k; block += STEP) {
                const int64_t count = std::min(STEP, n - block);
                squared_distances(cloud, n, block, count, centre, d);
                for (int64_t j = 0; j < count && found < k; ++j)
                    if (d[j] < limit) row[found++] = block + j;
            }
            std::fill(row + found, row + k, found ? row[0] : 0);
        }
    });
}

// ---------------------------------------------------------------------------------------------------------------
// group_grad

// rows of g [groups, C] are added to the rows of d [N, C] that `index` names, for channels from `first` on
MMFUSE_CLONES
void add_rows(const float* g, const int64_t* index, int64_t rows, int64_t channels, int64_t first, int64_t count,
              float* d) {
    for (int64_t i = 0; i < rows; ++i) {
        const float* from = g + i * channels + first;
        float* to = d + index[i] * channels + first;
#pragma omp simd
        for (int64_t c = 0; c < count; ++c) to[c] += from[c];
    }
}

void group_grad(Tensor grad, Tensor index, Tensor features) {
    check_sizes(grad, "grad", {FREE, FREE, FREE});
    const int64_t b = grad.size(0), m = grad.size(1), c = grad.size(2);
    check_sizes(index, "index", {b, m});
    check_sizes(features, "features", {b, FREE, c});
    const int64_t n = features.size(1);
    const float* g = floats(grad, "grad", grad, b * m * c);
    const int64_t* at = data<int64_t>(index, "index", grad, ScalarType::Long, b * m);
    float* d = floats(features, "features", grad, b * n * c);
    STD_TORCH_CHECK(std::all_of(at, at + b * m, [&](int64_t i) { return i >= 0 && i < n; }),
                    "index: expected indices of the ", n, " points of a cloud");
    constexpr int64_t SHARE = 64;  // channels of one owner
    const int64_t shares = ceil_div(c, SHARE);
    torch::stable::parallel_for(0, b * shares, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t cloud = i / shares, first = i % shares * SHARE;
            add_rows(g + cloud * m * c, at + cloud * m, m, c, first, std::min(SHARE, c - first), d + cloud * n * c);
        }
    });
}

}  // namespace
}  // namespace mmfuse

STABLE_TORCH_LIBRARY_FRAGMENT(mmfuse_cpu, m) {
    m.def("farthest_points(Tensor points, Tensor start, Tensor(a!) index) -> ()");
    m.def("nearest_neighbors(Tensor query, Tensor points, Tensor(a!) index) -> ()");
    m.def("ball_query(Tensor query, Tensor points, float radius, Tensor(a!) index) -> ()");
    m.def("group_grad(Tensor grad, Tensor index, Tensor(a!) features) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mmfuse_cpu, CPU, m) {
    m.impl("farthest_points", TORCH_BOX(&mmfuse::farthest_points));
    m.impl("nearest_neighbors", TORCH_BOX(&mmfuse::nearest_neighbors));
    m.impl("ball_query", TORCH_BOX(&mmfuse::ball_query));
    m.impl("group_grad", TORCH_BOX(&mmfuse::group_grad));
}
