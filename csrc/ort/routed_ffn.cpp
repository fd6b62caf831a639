// routed_ffn as a node of onnxruntime: of each run of rows two products, and in one pass what is between them.

#include "../cpu/packed.h"
#include "../cpu/rows.h"
#include "node.h"

namespace mmfuse::ort {
namespace {

// x sigmoid(linear x + cubic x^3)
MMFUSE_CLONES
void swish(float* x, int64_t n, float linear, float cubic) {
    const Exp exp;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) x[j] = x[j] / (1 + exp(-x[j] * (linear + cubic * x[j] * x[j])));
}

MMFUSE_CLONES
void times(float* x, const float* y, int64_t n) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) x[j] *= y[j];
}

// residual + factor scale y; null: none
MMFUSE_CLONES
void end_row(float* y, int64_t n, const float* residual, const float* scale, float factor) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j)
        y[j] = (residual ? residual[j] : 0.0f) + factor * (scale ? scale[j] * y[j] : y[j]);
}

struct Activation {
    bool gelu, gated;
    float linear, cubic;  // 0: no swish

    explicit Activation(const std::string& name)
        : gelu(name == "gelu" || name == "geglu"), gated(name == "swiglu" || name == "geglu"), linear(0), cubic(0) {
        if (name == "silu" || name == "swiglu") linear = 1;
        if (name == "quick_gelu") linear = 1.702f;
        if (name == "gelu_tanh") linear = 1.59576912f, cubic = 0.0713548163f;  // 2 sqrt(2 / pi) (1, 0.044715)
        expect(gelu || linear != 0 || name == "none", "activation: expected one that is known, got ", name);
    }

    // what a row [n], or [2 n] where it is gated, becomes, in its first n; followed by a norm
    void operator()(float* z, int64_t n, const Norm& norm, float* buffer) const {
        float mean, rstd;
        if (linear != 0) swish(z, n, linear, cubic);
        if (gelu || (norm.gamma && !gated)) forward_of(z, 1, n, gelu, gated ? Norm{} : norm, z, &mean, &rstd, buffer);
        if (!gated) return;
        times(z, z + n, n);
        if (norm.gamma) forward_of(z, 1, n, false, norm, z, &mean, &rstd, buffer);
    }
};

// A parameter of the experts: one array of all, or one of each.
struct Parameter {
    std::vector<const float*> at;
    std::vector<int64_t> sizes;  // of an expert's

    template <class From>  // an input of the node by name and number
    Parameter(const From& from, const char* name, size_t dims) {
        for (size_t i = 0;; ++i) {
            const Array given = from(name, i);
            if (!given) return;
            expect(given.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, name, ": expected float32");
            const bool every = given.sizes.size() == dims + 1;
            expect(every || given.sizes.size() == dims, name, ": expected ", dims, " dimensions of each expert");
            const std::vector<int64_t> own(given.sizes.begin() + every, given.sizes.end());
            expect(i == 0 || own == sizes, name, ": expected one shape");
            sizes = own;
            int64_t numel = 1;
            for (const int64_t n : own) numel *= n;
            for (int64_t e = 0; e < (every ? given.size(0) : 1); ++e)
                at.push_back(static_cast<const float*>(given.at) + e * numel);
        }
    }

    void check(const char* name, size_t experts, std::initializer_list<int64_t> expected) const {
        if (at.empty()) return;
        expect(at.size() == experts, name, ": expected ", experts, " experts, got ", at.size());
        expect(std::equal(sizes.begin(), sizes.end(), expected.begin(), expected.end()), name,
               ": expected the sizes of the products");
    }

    const float* of(int64_t e) const { return at.empty() ? nullptr : at[e]; }
};

// The products of all experts, packed.
struct Products {
    std::vector<Packed> in, out;
    int64_t k, wide, f, n;

    template <class From>
    Products(const From& from, bool gated, const Threads& threads) {
        const Parameter w1(from, "weights_in", 2), b1(from, "biases_in", 1), w2(from, "weights_out", 2);
        const Parameter b2(from, "biases_out", 1);
        expect(!w1.at.empty() && !w2.at.empty(), "weights_in, weights_out: expected at least one expert");
        const size_t experts = w1.at.size();
        k = w1.sizes[1], wide = w1.sizes[0], f = gated ? wide / 2 : wide, n = w2.sizes[0];
        w1.check("weights_in", experts, {gated ? 2 * f : f, k}), b1.check("biases_in", experts, {wide});
        w2.check("weights_out", experts, {n, f}), b2.check("biases_out", experts, {n});
        for (size_t e = 0; e < experts; ++e) {
            in.emplace_back(w1.of(e), b1.of(e), wide, k, threads);
            out.emplace_back(w2.of(e), b2.of(e), n, f, threads);
        }
    }
};

class RoutedFFN final : public Kernel {
  public:
    explicit RoutedFFN(const Node& node)
        : activation_(node.text("activation", "gelu")),
          eps_(node.number("eps", 0)),
          inner_eps_(node.number("inner_eps", 0)),
          centred_(node.integer("centred", 1)),
          experts_(node.integers("experts")) {
        bool constant = true;
        for (const char* name : {"weights_in", "biases_in", "weights_out", "biases_out"})
            for (size_t i = 0; i < node.given(name); ++i) constant &= bool(node.constant(name, i));
        const auto from = [&](const char* name, size_t i) { return node.constant(name, i); };
        if (constant) packed_ = std::make_unique<Products>(from, activation_.gated, Threads{});
    }

    void compute(const Call& call) const override {
        const auto from = [&](const char* name, size_t i) { return call.input(name, i); };
        if (packed_) return compute(call, *packed_, from);
        compute(call, Products(from, activation_.gated, call.threads), from);
    }

  private:
    template <class From>
    void compute(const Call& call, const Products& products, const From& from) const {
        const int64_t t = call.input("x").size(0), k = products.k, wide = products.wide, f = products.f, n = products.n;
        const int64_t runs = experts_.size();
        const size_t e = products.in.size();
        const float* rows = floats(call.input("x"), "x", {FREE, k});
        const int64_t* bounds = integers(call.input("offsets"), "offsets", {runs + 1});
        const Parameter inner(from, "inner_gammas", 1), inner_beta(from, "inner_betas", 1);
        const Parameter gamma(from, "gammas", 1), beta(from, "betas", 1);
        inner.check("inner_gammas", e, {f}), inner_beta.check("inner_betas", e, {f});
        gamma.check("gammas", e, {k}), beta.check("betas", e, {k});
        const float *residual = floats(call.input("residual"), "residual", {t, n}),
                    *scale = floats(call.input("scale"), "scale", {n}),
                    *factor = floats(call.input("row_scale"), "row_scale", {t});
        int64_t most = 0;
        expect(bounds[0] == 0 && bounds[runs] == t, "offsets: expected numbers from 0 to ", t);
        for (int64_t r = 0; r < runs; ++r) {
            expect(bounds[r] <= bounds[r + 1], "offsets: expected numbers that do not fall");
            expect(experts_[r] >= 0 && experts_[r] < int64_t(e), "experts: expected one of ", e);
            most = std::max(most, bounds[r + 1] - bounds[r]);
        }
        float* out = call.output<float>(0, {t, n});
        const Scratch z = call.scratch(most * wide), normed = call.scratch(gamma.at.empty() ? 0 : most * k);
        for (int64_t r = 0; r < runs; ++r) {
            const int64_t first = bounds[r], count = bounds[r + 1] - first, own = experts_[r];
            if (count == 0) continue;
            const Norm before{gamma.of(own), beta.of(own), centred_, eps_}, between{inner.of(own), inner_beta.of(own), true, inner_eps_};
            const float* operand = rows + first * k;
            if (before.gamma) {
                each(call, count, k, [&](int64_t i, float* buffer) {
                    float mean, rstd;
                    forward_of(operand + i * k, 1, k, false, before, normed.at + i * k, &mean, &rstd, buffer);
                });
                operand = normed.at;
            }
            float* to = out + first * n;
            products.in[own].multiply(z.at, 0, wide, operand, 0, k, 1, count, call.threads);
            each(call, count, f, [&](int64_t i, float* buffer) { activation_(z.at + i * wide, f, between, buffer); });
            products.out[own].multiply(to, 0, n, z.at, 0, wide, 1, count, call.threads);
            if (residual || scale || factor)
                each(call, count, n, [&](int64_t i, float*) {
                    end_row(to + i * n, n, residual ? residual + (first + i) * n : nullptr, scale,
                            factor ? factor[first + i] : 1.0f);
                });
        }
    }

  private:
    template <class F>
    static void each(const Call& call, int64_t rows, int64_t width, const F& f) {
        call.threads(0, rows, ceil_div(16384, width + 1), [&](int64_t begin, int64_t end) {
            std::vector<float> buffer(width);
            for (int64_t i = begin; i < end; ++i) f(i, buffer.data());
        });
    }

    const Activation activation_;
    const float eps_, inner_eps_;
    const bool centred_;
    const std::vector<int64_t> experts_;
    std::unique_ptr<Products> packed_;
};

}  // namespace

std::unique_ptr<Kernel> routed_ffn(const Node& node) { return std::make_unique<RoutedFFN>(node); }

}  // namespace mmfuse::ort
