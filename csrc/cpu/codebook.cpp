// Nearest code and the statistics of codes on the CPU, of torch's tensors.

#include "codebook.h"
#include "threads.h"

#include <vector>

#include <torch/csrc/stable/library.h>

namespace mmfuse {
namespace {

void code_argmax(Tensor z, Tensor weight, Tensor scale, Tensor bias, Tensor mask, Tensor codes) {
    check_sizes(z, "z", {FREE, FREE});
    check_sizes(weight, "weight", {FREE, z.size(1)});
    const int64_t n = z.size(0), d = z.size(1), K = weight.size(0);
    STD_TORCH_CHECK(K > 0 && K < (int64_t(1) << 31), "weight: expected at least one code");
    const float* rows = floats(z, "z", z, n * d);
    const bool* wanted = optional_data<bool>(mask, "mask", z, ScalarType::Bool, n);
    int64_t* out = data<int64_t>(codes, "codes", z, ScalarType::Long, n);
    Codes book(floats(weight, "weight", z, K * d), optional_data<double>(scale, "scale", z, ScalarType::Double, K),
               optional_data<double>(bias, "bias", z, ScalarType::Double, K), K, d);
    book.pack(OF_TORCH);
    search(book, rows, wanted, n, out, OF_TORCH);
}

// ---------------------------------------------------------------------------------------------------------------
// statistics

MMFUSE_CLONES
void add_row(const float* x, double* sum, int64_t d) {
#pragma omp simd
    for (int64_t k = 0; k < d; ++k) sum[k] += x[k];
}

void code_statistics(Tensor z, Tensor codes, Tensor counts, Tensor sums) {
    check_sizes(z, "z", {FREE, FREE});
    check_sizes(sums, "sums", {FREE, z.size(1)});
    const int64_t n = z.size(0), d = z.size(1), K = sums.size(0);
    const float* rows = floats(z, "z", z, n * d);
    const int64_t* code = data<int64_t>(codes, "codes", z, ScalarType::Long, n);
    float* count = floats(counts, "counts", z, K);
    float* sum = floats(sums, "sums", z, K * d);

    // rows in the order of their codes
    std::vector<int64_t> begin_of(K + 1), order(n);
    for (int64_t i = 0; i < n; ++i)
        if (code[i] >= 0 && code[i] < K) ++begin_of[code[i] + 1];
    for (int64_t k = 0; k < K; ++k) begin_of[k + 1] += begin_of[k];
    std::vector<int64_t> next(begin_of.begin(), begin_of.end() - 1);
    for (int64_t i = 0; i < n; ++i)
        if (code[i] >= 0 && code[i] < K) order[next[code[i]]++] = i;

    torch::stable::parallel_for(0, K, ceil_div(65536, (1 + n / (K + 1)) * (d + 1)), [&](int64_t begin, int64_t end) {
        std::vector<double> total(d);
        for (int64_t k = begin; k < end; ++k) {
            std::fill(total.begin(), total.end(), 0.0);
            for (int64_t i = begin_of[k]; i < begin_of[k + 1]; ++i) add_row(rows + order[i] * d, total.data(), d);
            count[k] = float(begin_of[k + 1] - begin_of[k]);
            std::copy(total.begin(), total.end(), sum + k * d);
        }
    });
}

}  // namespace
}  // namespace mmfuse

STABLE_TORCH_LIBRARY_FRAGMENT(mmfuse_cpu, m) {
    m.def("code_argmax(Tensor z, Tensor weight, Tensor scale, Tensor bias, Tensor mask, Tensor(a!) codes) -> ()");
    m.def("code_statistics(Tensor z, Tensor codes, Tensor(a!) counts, Tensor(b!) sums) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mmfuse_cpu, CPU, m) {
    m.impl("code_argmax", TORCH_BOX(&mmfuse::code_argmax));
    m.impl("code_statistics", TORCH_BOX(&mmfuse::code_statistics));
}
