// Selections over a block of logits on the CPU: draws by Gumbel keys, and the k largest.
//
// Both keep a running list of the k largest keys of each row (or column), largest first and first on ties, that blocks
// are merged into. The results do not depend on the number of threads or on the blocks.

#include "../tensor.h"
#include "simd.h"

#include <algorithm>
#include <functional>
#include <limits>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

namespace mmfuse {
namespace {

constexpr int64_t GROUP = 128, QUARTER = GROUP / 4;  // columns that share 32 counters, one output each
constexpr float INF = std::numeric_limits<float>::infinity();

// ---------------------------------------------------------------------------------------------------------------
// Gumbel noise; the definition is kernels/contrastive/negatives/noise.py

// log(x) of a normal positive x: 2^e (1 + f), 1 + f between sqrt(1/2) and sqrt(2) (Moshier's polynomial); log(1) is 0, and
// near it the relative error stays that of a rounding
MMFUSE_INLINE float log_of(float x) {
    const int32_t bits = std::bit_cast<int32_t>(x) - 0x3f3504f3;
    const float e = float(bits >> 23), f = std::bit_cast<float>((bits & 0x7fffff) + 0x3f3504f3) - 1.0f;
    float p = 7.0376836292e-2f;
    p = p * f - 1.1514610310e-1f;
    p = p * f + 1.1676998740e-1f;
    p = p * f - 1.2420140846e-1f;
    p = p * f + 1.4249322787e-1f;
    p = p * f - 1.6668057665e-1f;
    p = p * f + 2.0000714765e-1f;
    p = p * f - 2.4999993993e-1f;
    p = p * f + 3.3333331174e-1f;
    const float z = f * f;
    return f + (f * z * p - e * 2.12194440e-4f - 0.5f * z) + e * 0.693359375f;
}

// -log(E), E = -log(1 - u), of 31 random bits
MMFUSE_INLINE float gumbel_of(uint32_t bits, float below_one) {
    float u = (float(int32_t(bits >> 1)) + 0.5f) * 0x1p-31f;
    u = u < below_one ? u : below_one;
    // what 1 - u loses is given back, for the small E are those that win
    const float rest = 1.0f - u, lost = (1.0f - rest) - u;
    return -log_of(-(log_of(rest) + lost));
}

struct Noise {
    uint32_t k0, k1, stream;

    // the 128 columns of group g in row i
    void group(int64_t i, int64_t g, float* out) const { fill(*this, uint32_t(i), uint32_t(g * QUARTER), out); }

    static void fill(Noise noise, uint32_t i, uint32_t first, float* out);
};

MMFUSE_CLONES
void Noise::fill(Noise noise, uint32_t i, uint32_t first, float* out) {
    constexpr uint64_t low = 0xffffffffu;
    uint32_t bits[GROUP];
    // 32 bits to a lane of 64, which holds their products
#pragma omp simd
    for (uint64_t r = 0; r < QUARTER; ++r) {
        uint64_t x0 = (first + r) & low, x1 = i, x2 = noise.stream, x3 = 0;
        uint32_t k0 = noise.k0, k1 = noise.k1;
#pragma GCC unroll 10
        for (int round = 0; round < 10; ++round) {  // Philox4x32-10
            const uint64_t a = 0xD2511F53u * x0, b = 0xCD9E8D57u * x2;
            x0 = (b >> 32) ^ x1 ^ k0, x1 = b & low;
            x2 = (a >> 32) ^ x3 ^ k1, x3 = a & low;
            k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
        }
        bits[r] = uint32_t(x0), bits[QUARTER + r] = uint32_t(x1);
        bits[2 * QUARTER + r] = uint32_t(x2), bits[3 * QUARTER + r] = uint32_t(x3);
    }
    const float below_one = opaque(1.0f - 0x1p-24f);
#pragma omp simd
    for (int64_t j = 0; j < GROUP; ++j) out[j] = gumbel_of(bits[j], below_one);
}

// ---------------------------------------------------------------------------------------------------------------
// running lists

struct List {
    float* key;  // [k], largest first
    int64_t* index;
    int64_t k;

    float least() const { return key[k - 1]; }

    // after its equals; `x` is larger than the least
    void insert(float x, int64_t i) const {
        int64_t at = k - 1;
        if (k > 32) {
            at = std::upper_bound(key, key + at, x, std::greater<float>()) - key;
            std::copy_backward(key + at, key + k - 1, key + k);
            std::copy_backward(index + at, index + k - 1, index + k);
        } else {
            for (; at > 0 && x > key[at - 1]; --at) key[at] = key[at - 1], index[at] = index[at - 1];
        }
        key[at] = x, index[at] = i;
    }
};

// whether any of n keys is above the threshold; NaN and what is below `lowest` count as `lowest`
MMFUSE_CLONES
bool any_above(const float* s, float lowest, float threshold, int64_t n) {
    int any = 0;
#pragma omp simd reduction(| : any)
    for (int64_t j = 0; j < n; ++j) any |= (s[j] >= lowest ? s[j] : lowest) > threshold;
    return any;
}

MMFUSE_CLONES
bool any_above(const float* s, const float* threshold, int64_t n) {
    int any = 0;
#pragma omp simd reduction(| : any)
    for (int64_t j = 0; j < n; ++j) any |= s[j] > threshold[j];
    return any;
}

// ---------------------------------------------------------------------------------------------------------------
// gumbel_race

constexpr float LOWEST = -1e30f;

// key = scale * u + noise, in place of the noise; -inf where the ids are equal. A scale of 0 is a race without logits,
// whatever they are.
MMFUSE_CLONES
void keys_of(const float* u, float scale, int64_t id, const int64_t* ids, float* key, int64_t n) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) {
        float s = scale == 0 ? 0.0f : scale * u[j];
        s = s >= LOWEST ? s : LOWEST;
        key[j] = ids[j] == id ? -INF : s + key[j];
    }
}

// Calls f(begin, end, g): the columns of the block that lie in noise group g.
template <class F>
void for_groups(int64_t col, int64_t begin, int64_t end, const F& f) {
    for (int64_t j = begin; j < end;) {
        const int64_t g = (col + j) / GROUP, next = std::min(end, (g + 1) * GROUP - col);
        f(j, next, g);
        j = next;
    }
}

void gumbel_race(Tensor u, Tensor scale, Tensor ids, Tensor key_ids, Tensor seed, int64_t row, int64_t col,
                 int64_t stream, int64_t first, Tensor key, Tensor index) {
    check_sizes(u, "u", {FREE, FREE});
    const int64_t r = u.size(0), n = u.size(1), count = stream % 2 ? r : n;
    check_sizes(key, "key", {count, FREE});
    const int64_t k = key.size(1);
    STD_TORCH_CHECK(k > 0, "key: expected at least one draw");
    check_first(row, "row", r), check_first(col, "col", n), check_first(first, "first", stream % 2 ? n : r);
    const float* logits = floats(u, "u", u, r * n);
    const float s = *floats(scale, "scale", u, 1);
    const int64_t* row_id = data<int64_t>(ids, "ids", u, ScalarType::Long, r);
    const int64_t* col_id = data<int64_t>(key_ids, "key_ids", u, ScalarType::Long, n);
    const uint64_t key_of_noise = *data<int64_t>(seed, "seed", u, ScalarType::Long, 1);
    const Noise noise{uint32_t(key_of_noise), uint32_t(key_of_noise >> 32), uint32_t(stream)};
    float* largest = floats(key, "key", u, count * k);
    int64_t* at = data<int64_t>(index, "index", u, ScalarType::Long, count * k);

    // the keys of one row in one group of columns
    const auto fill = [&](int64_t i, int64_t begin, int64_t end, int64_t g, float* buffer) {
        noise.group(row + i, g, buffer);
        float* keys = buffer + (col + begin - g * GROUP);
        keys_of(logits + i * n + begin, s, row_id[i], col_id + begin, keys, end - begin);
        return keys;
    };

    if (stream % 2) {
        torch::stable::parallel_for(0, r, ceil_div(4096, n + 1), [&](int64_t top, int64_t bottom) {
            alignas(64) float buffer[GROUP];
            for (int64_t i = top; i < bottom; ++i) {
                const List list{largest + i * k, at + i * k, k};
                for_groups(col, 0, n, [&](int64_t begin, int64_t end, int64_t g) {
                    const float* keys = fill(i, begin, end, g, buffer);
                    if (!any_above(keys, -INF, list.least(), end - begin)) return;
                    for (int64_t j = begin; j < end; ++j)
                        if (keys[j - begin] > list.least()) list.insert(keys[j - begin], first + j);
                });
            }
        });
        return;
    }
    // a thread's part begins where a group does, and is wide enough to read the rows in order
    constexpr int64_t WIDTH = 8 * GROUP;
    const int64_t shift = col % GROUP;
    torch::stable::parallel_for(0, ceil_div(shift + n, WIDTH), 1, [&](int64_t left, int64_t right) {
        alignas(64) float buffer[GROUP], least[WIDTH];
        const auto list = [&](int64_t j) { return List{largest + j * k, at + j * k, k}; };
        for (int64_t part = left; part < right; ++part) {
            const int64_t first_col = std::max(part * WIDTH - shift, int64_t(0));
            const int64_t last_col = std::min((part + 1) * WIDTH - shift, n);
            for (int64_t j = first_col; j < last_col; ++j) least[j - first_col] = list(j).least();
            for (int64_t i = 0; i < r; ++i)
                for_groups(col, first_col, last_col, [&](int64_t begin, int64_t end, int64_t g) {
                    const float* keys = fill(i, begin, end, g, buffer);
                    float* least_of = least + (begin - first_col);
                    if (!any_above(keys, least_of, end - begin)) return;
                    for (int64_t j = begin; j < end; ++j)
                        if (keys[j - begin] > least_of[j - begin]) {
                            list(j).insert(keys[j - begin], first + i);
                            least_of[j - begin] = list(j).least();
                        }
                });
        }
    });
}

// ---------------------------------------------------------------------------------------------------------------
// top_scores

struct Scored {
    float x;
    int64_t j;

    // the larger first, of equals the first
    bool operator<(const Scored& other) const { return x > other.x || (x == other.x && j < other.j); }
};

// A list that is still empty, from the n >= k scores of a row.
void fill(const List& list, const float* s, float lowest, int64_t first, int64_t n, std::vector<Scored>& row) {
    row.resize(n);
    for (int64_t j = 0; j < n; ++j) row[j] = {s[j] >= lowest ? s[j] : lowest, first + j};
    if (list.k < n) std::nth_element(row.begin(), row.begin() + list.k - 1, row.end());
    std::sort(row.begin(), row.begin() + list.k);
    for (int64_t j = 0; j < list.k; ++j) list.key[j] = row[j].x, list.index[j] = row[j].j;
}

void top_scores(Tensor s, int64_t first, Tensor value, Tensor index) {
    check_sizes(s, "s", {FREE, FREE});
    const int64_t r = s.size(0), n = s.size(1);
    check_sizes(value, "value", {r, FREE});
    const int64_t k = value.size(1);
    STD_TORCH_CHECK(k > 0, "value: expected at least one place in a list");
    check_first(first, "first", n);
    const float* scores = floats(s, "s", s, r * n);
    float* largest = floats(value, "value", s, r * k);
    int64_t* at = data<int64_t>(index, "index", s, ScalarType::Long, r * k);
    constexpr float lowest = std::numeric_limits<float>::lowest();

    torch::stable::parallel_for(0, r, ceil_div(32768, n + 1), [&](int64_t top, int64_t bottom) {
        std::vector<Scored> row;
        for (int64_t i = top; i < bottom; ++i) {
            const List list{largest + i * k, at + i * k, k};
            // a list that takes much of the row is sorted rather than inserted into
            if (k <= n && n <= 16 * k && list.key[0] == -INF) {
                fill(list, scores + i * n, lowest, first, n, row);
                continue;
            }
            for (int64_t begin = 0; begin < n; begin += GROUP) {
                const int64_t end = std::min(begin + GROUP, n);
                const float* s_i = scores + i * n;
                if (!any_above(s_i + begin, lowest, list.least(), end - begin)) continue;
                for (int64_t j = begin; j < end; ++j) {
                    const float x = s_i[j] >= lowest ? s_i[j] : lowest;
                    if (x > list.least()) list.insert(x, first + j);
                }
            }
        }
    });
}

}  // namespace
}  // namespace mmfuse

STABLE_TORCH_LIBRARY_FRAGMENT(mmfuse_cpu, m) {
    m.def(
        "gumbel_race(Tensor u, Tensor scale, Tensor ids, Tensor key_ids, Tensor seed, int row, int col, int stream, "
        "int first, Tensor(a!) key, Tensor(b!) index) -> ()");
    m.def("top_scores(Tensor s, int first, Tensor(a!) value, Tensor(b!) index) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mmfuse_cpu, CPU, m) {
    m.impl("gumbel_race", TORCH_BOX(&mmfuse::gumbel_race));
    m.impl("top_scores", TORCH_BOX(&mmfuse::top_scores));
}
