// Attention of a few queries over few tokens on the CPU, of torch's tensors.

#include "../few_query_tensors.h"
#include "few_query_attention.h"
#include "threads.h"

#include <torch/csrc/stable/library.h>

namespace mmfuse {
namespace {

void few_query_attention(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& kv_index,
                         const std::optional<Tensor>& lengths, const std::optional<Tensor>& cu_seqlens, int64_t longest,
                         Tensor o, Tensor row_max, Tensor row_sum) {
    const FewQueries c = few_queries(q, k, v, kv_index, lengths, cu_seqlens, longest, o, row_max, row_sum);
    STD_TORCH_CHECK(q.scalar_type() == ScalarType::Float, "q: expected float32");
    const auto of = [](const Tensor& t) { return static_cast<float*>(t.data_ptr()); };
    attend_all(c, of(q), of(k), of(v), of(o), OF_TORCH);
}

}  // namespace
}  // namespace mmfuse

STABLE_TORCH_LIBRARY_FRAGMENT(mmfuse_cpu, m) {
    m.def(
        "few_query_attention(Tensor q, Tensor k, Tensor v, Tensor? kv_index, Tensor? lengths, Tensor? cu_seqlens, "
        "int longest, Tensor(a!) o, Tensor(b!) row_max, Tensor(c!) row_sum) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mmfuse_cpu, CPU, m) {
    m.impl("few_query_attention", TORCH_BOX(&mmfuse::few_query_attention));
}
