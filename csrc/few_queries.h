// The arguments of attention of a few queries over the tokens of images, checked.
#pragma once

#include "tensor.h"

#include <cmath>
#include <optional>

namespace mmfuse {

struct FewQueries {
    // of [outer, token, head, feature], or of packed [token, head, feature]; 0 where there is one
    struct Strides {
        int64_t outer, token, head;
    };

    int64_t queries, heads, d, images, rows, tokens, longest;  // tokens: of all images, if packed
    const int64_t *index, *lengths, *bounds;  // null where not given
    Strides of_q, of_k, of_v;
    float *row_max, *row_sum;  // [rows, heads, queries]
    float scale;

    // `o` is checked, too; it is [rows, queries, heads, d].
    FewQueries(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& kv_index,
               const std::optional<Tensor>& counts, const std::optional<Tensor>& cu_seqlens, int64_t longest,
               const Tensor& o, const Tensor& most, const Tensor& sum)
        : longest(longest) {
        check_sizes(q, "q", {FREE, FREE, FREE, FREE});
        queries = q.size(1), heads = q.size(2), d = q.size(3);
        STD_TORCH_CHECK(heads > 0 && d > 0, "q: expected at least one head of at least one feature");
        if (cu_seqlens)
            check_sizes(k, "k", {FREE, heads, d}), check_sizes(v, "v", {k.size(0), heads, d});
        else
            check_sizes(k, "k", {FREE, FREE, heads, d}), check_sizes(v, "v", {k.size(0), k.size(1), heads, d});
        tokens = k.size(0), images = cu_seqlens ? cu_seqlens->numel() - 1 : tokens;
        rows = kv_index ? kv_index->numel() : images;
        STD_TORCH_CHECK(images >= 0, "cu_seqlens: expected at least one number");
        STD_TORCH_CHECK(longest >= 0 && longest <= INT32_MAX / 256 && (cu_seqlens || longest == k.size(1)),
                        "longest: expected the most tokens of an image, got ", longest);
        STD_TORCH_CHECK(q.size(0) == rows || q.size(0) == 1, "q: expected ", rows, " rows or one, got ", q.size(0));
        for (const Tensor& t : {k, v})
            STD_TORCH_CHECK(t.scalar_type() == q.scalar_type() && same_device(t, q),
                            "k, v: expected the type and the device of q");
        index = numbers(kv_index, "kv_index", q, rows), lengths = numbers(counts, "lengths", q, images);
        bounds = numbers(cu_seqlens, "cu_seqlens", q, images + 1);
        of_q = strides(q, "q"), of_k = strides(k, "k"), of_v = strides(v, "v");
        data<char>(o, "o", q, q.scalar_type(), rows * queries * heads * d);
        row_max = floats(most, "row_max", q, rows * heads * queries);
        row_sum = floats(sum, "row_sum", q, rows * heads * queries);
        scale = float(1 / std::sqrt(double(d)));
    }

  private:
    static const int64_t* numbers(const std::optional<Tensor>& t, const char* name, const Tensor& q, int64_t count) {
        return t ? data<int64_t>(*t, name, q, ScalarType::Long, count) : nullptr;
    }

    static Strides strides(const Tensor& t, const char* name) {
        const int64_t dims = t.dim();
        const auto stride = [&](int64_t dim) { return dim < 0 || t.size(dim) == 1 ? 0 : t.stride(dim); };
        STD_TORCH_CHECK(t.numel() == 0 || (t.data_ptr() != nullptr && (t.size(dims - 1) == 1 || t.stride(dims - 1) == 1)),
                        name, ": expected memory, and features of unit stride");
        return {stride(dims - 4), stride(dims - 3), stride(dims - 2)};
    }
};

}  // namespace mmfuse
