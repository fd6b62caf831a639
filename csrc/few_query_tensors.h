// The arguments of attention of a few queries over the tokens of images, checked.
#pragma once

#include "few_queries.h"
#include "tensor.h"

#include <cmath>
#include <optional>

namespace mmfuse {

inline const int64_t* few_query_numbers(const std::optional<Tensor>& t, const char* name, const Tensor& q, int64_t count) {
    return t ? data<int64_t>(*t, name, q, ScalarType::Long, count) : nullptr;
}

inline FewQueries::Strides few_query_strides(const Tensor& t, const char* name) {
    const int64_t dims = t.dim();
    const auto stride = [&](int64_t dim) { return dim < 0 || t.size(dim) == 1 ? 0 : t.stride(dim); };
    STD_TORCH_CHECK(t.numel() == 0 || (t.data_ptr() != nullptr && (t.size(dims - 1) == 1 || t.stride(dims - 1) == 1)),
                    name, ": expected memory, and features of unit stride");
    return {stride(dims - 4), stride(dims - 3), stride(dims - 2)};
}

// `o` is checked, too; it is [rows, queries, heads, d].
inline FewQueries few_queries(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& kv_index,
                              const std::optional<Tensor>& counts, const std::optional<Tensor>& cu_seqlens,
                              int64_t longest, const Tensor& o, const Tensor& most, const Tensor& sum) {
    FewQueries c;
    check_sizes(q, "q", {FREE, FREE, FREE, FREE});
    c.longest = longest, c.queries = q.size(1), c.heads = q.size(2), c.d = q.size(3);
    STD_TORCH_CHECK(c.heads > 0 && c.d > 0, "q: expected at least one head of at least one feature");
    if (cu_seqlens)
        check_sizes(k, "k", {FREE, c.heads, c.d}), check_sizes(v, "v", {k.size(0), c.heads, c.d});
    else
        check_sizes(k, "k", {FREE, FREE, c.heads, c.d}), check_sizes(v, "v", {k.size(0), k.size(1), c.heads, c.d});
    c.tokens = k.size(0), c.images = cu_seqlens ? cu_seqlens->numel() - 1 : c.tokens;
    c.rows = kv_index ? kv_index->numel() : c.images;
    STD_TORCH_CHECK(c.images >= 0, "cu_seqlens: expected at least one number");
    STD_TORCH_CHECK(longest >= 0 && longest <= INT32_MAX / 256 && (cu_seqlens || longest == k.size(1)),
                    "longest: expected the most tokens of an image, got ", longest);
    STD_TORCH_CHECK(q.size(0) == c.rows || q.size(0) == 1, "q: expected ", c.rows, " rows or one, got ", q.size(0));
    for (const Tensor& t : {k, v})
        STD_TORCH_CHECK(t.scalar_type() == q.scalar_type() && same_device(t, q),
                        "k, v: expected the type and the device of q");
    c.index = few_query_numbers(kv_index, "kv_index", q, c.rows);
    c.lengths = few_query_numbers(counts, "lengths", q, c.images);
    c.bounds = few_query_numbers(cu_seqlens, "cu_seqlens", q, c.images + 1);
    c.of_q = few_query_strides(q, "q"), c.of_k = few_query_strides(k, "k"), c.of_v = few_query_strides(v, "v");
    data<char>(o, "o", q, q.scalar_type(), c.rows * c.queries * c.heads * c.d);
    c.row_max = floats(most, "row_max", q, c.rows * c.heads * c.queries);
    c.row_sum = floats(sum, "row_sum", q, c.rows * c.heads * c.queries);
    c.scale = float(1 / std::sqrt(double(c.d)));
    return c;
}

}  // namespace mmfuse
