// few_query_attention as a node of onnxruntime.

#include "../cpu/few_query_attention.h"
#include "node.h"

#include <cmath>

namespace mmfuse::ort {
namespace {

FewQueries::Strides strides(const Array& t) {
    const size_t dims = t.sizes.size();
    const auto size = [&](size_t dim) { return t.sizes[dims - dim]; };
    const auto unless_one = [&](size_t dim, int64_t stride) { return size(dim) == 1 ? 0 : stride; };
    const int64_t head = size(1), token = size(2) * head;
    return {dims == 4 ? unless_one(4, size(3) * token) : 0, unless_one(3, token), unless_one(2, head)};
}

class FewQueryAttention final : public Kernel {
  public:
    explicit FewQueryAttention(const Node& node) : longest_(node.integer("longest", -1)) {
        expect(!node.given("seed") && node.number("dropout", 0) == 0, "dropout: expected none, it is for training");
    }

    void compute(const Call& call) const override {
        const Array q = call.input("q"), k = call.input("k"), v = call.input("v");
        const Array index = call.input("kv_index"), bounds = call.input("cu_seqlens");
        FewQueries c{};
        const float* queries = floats(q, "q", {FREE, FREE, FREE, FREE});
        c.queries = q.size(1), c.heads = q.size(2), c.d = q.size(3);
        expect(c.heads > 0 && c.d > 0, "q: expected at least one head of at least one feature");
        const float* keys = bounds ? floats(k, "k", {FREE, c.heads, c.d}) : floats(k, "k", {FREE, FREE, c.heads, c.d});
        expect(v.sizes == k.sizes, "v: expected the sizes of k");
        const float* values = bounds ? floats(v, "v", {FREE, FREE, FREE}) : floats(v, "v", {FREE, FREE, FREE, FREE});
        c.tokens = k.size(0), c.images = c.tokens, c.longest = bounds ? longest(call) : k.size(1);
        if (bounds) {
            c.bounds = integers(bounds, "cu_seqlens", {FREE});
            c.images = bounds.size(0) - 1;
            expect(c.images >= 0, "cu_seqlens: expected at least one number");
        }
        c.index = integers(index, "kv_index", {FREE});
        c.rows = index ? index.size(0) : c.images;
        c.lengths = integers(call.input("lengths"), "lengths", {c.images});
        expect(q.size(0) == c.rows || q.size(0) == 1, "q: expected ", c.rows, " rows or one, got ", q.size(0));
        c.of_q = strides(q), c.of_k = strides(k), c.of_v = strides(v);
        c.scale = float(1 / std::sqrt(double(c.d)));
        float* o = call.output<float>(0, {c.rows, c.queries, c.heads, c.d});
        c.row_max = call.output<float>(1, {c.rows, c.heads, c.queries});
        c.row_sum = call.output<float>(2, {c.rows, c.heads, c.queries});
        const int64_t count = c.rows * c.heads * c.queries;
        const Scratch most = call.scratch(c.row_max ? 0 : count), sum = call.scratch(c.row_sum ? 0 : count);
        c.row_max = c.row_max ? c.row_max : most.at, c.row_sum = c.row_sum ? c.row_sum : sum.at;
        attend_all(c, queries, keys, values, o, call.threads);
    }

  private:
    int64_t longest(const Call& call) const {
        const Array given = call.input("longest");
        const int64_t n = given ? *integers(given, "longest", {}) : longest_;
        expect(n >= 0, "longest: expected the most tokens of an image, got ", n);
        return n;
    }

    const int64_t longest_;
};

}  // namespace

std::unique_ptr<Kernel> few_query_attention(const Node& node) { return std::make_unique<FewQueryAttention>(node); }

}  // namespace mmfuse::ort
