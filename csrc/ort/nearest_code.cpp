// nearest_code as a node of onnxruntime. The codes are packed once, where they are a part of the file.

#include "../cpu/codebook.h"
#include "node.h"

namespace mmfuse::ort {
namespace {

// Float16 as float32, and float32 as it is.
class Floats {
  public:
    explicit Floats(const Array& array, const char* name) {
        if (array.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) {
            at = static_cast<const float*>(array.at);
            return;
        }
        expect(array.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, name, ": expected float32 or float16, got ONNX's type ",
               int(array.type));
        const auto* half = static_cast<const _Float16*>(array.at);
        own_.assign(half, half + array.numel());
        at = own_.data();
    }
    const float* at;

  private:
    std::vector<float> own_;
};

struct Book {
    Book(const Array& weight, const Array& scale, const Array& bias, const Threads& threads)
        : rows(weight, "weight"),
          scale(doubles(scale, "scale", weight.size(0))),
          bias(doubles(bias, "bias", weight.size(0))),
          codes(rows.at, scale ? this->scale.data() : nullptr, bias ? this->bias.data() : nullptr, weight.size(0),
                weight.size(1)) {
        codes.pack(threads);
    }
    Floats rows;
    std::vector<double> scale, bias;
    Codes codes;
};

void check_codes(const Array& weight) {
    check_sizes(weight, "weight", {FREE, FREE});
    expect(weight.size(0) > 0 && weight.size(0) < int64_t(1) << 31 && weight.size(1) > 0,
           "weight: expected at least one code of at least one feature");
}

class NearestCode final : public Kernel {
  public:
    explicit NearestCode(const Node& node) {
        const Array weight = node.constant("weight"), scale = node.constant("scale"), bias = node.constant("bias");
        if (!weight || bool(scale) != node.given("scale") || bool(bias) != node.given("bias")) return;
        check_codes(weight);
        book_ = std::make_unique<Book>(weight, scale, bias, Threads{});
    }

    void compute(const Call& call) const override {
        const Array z = call.input("z"), weight = call.input("weight");
        check_codes(weight);
        check_sizes(z, "z", {FREE, weight.size(1)});
        const int64_t n = z.size(0);
        const bool* mask = flags(call.input("mask"), "mask", {n});
        const Floats rows(z, "z");
        const auto into = [&](const Book& book) {
            search(book.codes, rows.at, mask, n, call.output<int64_t>(0, {n}), call.threads);
        };
        if (book_)
            into(*book_);
        else
            into(Book(weight, call.input("scale"), call.input("bias"), call.threads));
    }

  private:
    std::unique_ptr<Book> book_;
};

}  // namespace

std::unique_ptr<Kernel> nearest_code(const Node& node) { return std::make_unique<NearestCode>(node); }

}  // namespace mmfuse::ort
