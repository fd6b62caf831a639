// patch_embed as a node of onnxruntime: patches of a block of images, and one product into the rows of the result.
//
// The weight with the normalisation folded in is made once, where both are a part of the file.

#include "../cpu/packed.h"
#include "../cpu/patch.h"
#include "../cpu/rows.h"
#include "node.h"

#include <optional>

namespace mmfuse::ort {
namespace {

constexpr int64_t BLOCK = 4 << 20;  // bytes of patches

// pixels [B, C, T, H, W] by their strides, and the patches over them
struct Geometry {
    Source s;
    int64_t batch, d;
    bool still, padded;

    int64_t patches() const { return s.grid[0] * s.grid[1] * s.grid[2]; }
    int64_t volume() const { return s.kernel[0] * s.kernel[1] * s.kernel[2]; }
    int64_t k() const { return s.channels * volume(); }
};

class Layout {
  public:
    explicit Layout(const Node& node)
        : name_(node.text("layout", "nchw")), zero_(node.text("padding", "error") == "zero"), step_(node.integers("stride")) {}

    Geometry of(const Array& pixels, const Array& weight) const {
        Geometry g{};
        Source& s = g.s;
        const size_t dims = pixels.sizes.size(), kernel_dims = weight.sizes.size();
        expect(kernel_dims >= 2 && kernel_dims <= 5 && weight.numel() > 0, "weight: expected [D, K] or a convolution's");
        g.d = weight.size(0);
        s.kernel = s.step = s.size = {1, 1, 1};
        if (name_ == "patches") {
            s.channels = weight.numel() / g.d;
            check_sizes(pixels, "pixels", {FREE, FREE, s.channels});
            g.batch = pixels.size(0), s.size[2] = pixels.size(1);
            s.batch_stride = s.size[2] * s.channels, s.channel_stride = 1, s.stride = {0, 0, s.channels};
            s.channels_last = true, s.grid = s.size;
            return g;
        }
        s.channels = weight.size(1);
        g.still = name_ != "ntchw" && kernel_dims == 5 && dims == 4;
        expect(kernel_dims >= 3 && dims == kernel_dims - g.still, "pixels: expected the dimensions of layout ", name_);
        const size_t channel = name_ == "nchw" ? 1 : name_ == "ntchw" ? 2 : dims - 1;
        std::vector<int64_t> strides(dims, 1);
        for (size_t i = dims; i-- > 1;) strides[i - 1] = strides[i] * pixels.size(i);
        g.batch = pixels.size(0), s.batch_stride = strides[0], s.channel_stride = strides[channel];
        expect(pixels.size(channel) == s.channels, "pixels: expected ", s.channels, " channels as weight, got ",
               pixels.size(channel));
        int at = 2;
        for (size_t i = dims; i-- > 1;)
            if (i != channel) s.size[at] = pixels.size(i), s.stride[at--] = strides[i];
        expect(step_.empty() || step_.size() == kernel_dims - 2, "stride: expected one for each dimension");
        for (size_t i = 2; i < kernel_dims; ++i) {
            const size_t to = i + 5 - kernel_dims - 2;
            if (g.still && to == 0) continue;
            s.kernel[to] = weight.size(i), s.step[to] = step_.empty() ? weight.size(i) : step_[i - 2];
        }
        s.channels_last = s.channels > 1 && s.channel_stride < s.stride[2];
        for (int i = 0; i < 3; ++i) {
            const int64_t n = s.size[i], k = s.kernel[i], step = s.step[i];
            expect(step > 0, "stride: expected positive integers");
            expect(zero_ || (n >= k && (step != k || n % k == 0)), "pixels: expected ", n < k ? "at least " : "a multiple of ",
                   k, ", got ", n);
            s.grid[i] = (zero_ ? std::max<int64_t>(0, ceil_div(n - k, step)) : (n - k) / step) + 1;
            g.padded |= (s.grid[i] - 1) * step + k > n;
        }
        return g;
    }

  private:
    const std::string name_;
    const bool zero_;
    const std::vector<int64_t> step_;
};

// The operands of the product: (x - subtract) multiply, and weight and bias for them.
struct Folded {
    std::vector<float> subtract, multiply;  // [C] or none
    std::optional<Packed> weight;           // [D, K] and [D]

    Folded(const Geometry& g, bool bytes, const Threads& threads, const Array& weight, const Array& bias, const Array& mean,
           const Array& std) {
        const Source& s = g.s;
        const int64_t c = s.channels, volume = g.volume(), k = g.k(), slices = weight.numel() / (g.d * k);
        const std::vector<double> m = doubles(mean, "mean", c), d = doubles(std, "std", c);
        const auto* w = static_cast<const float*>(weight.at);
        expect(weight.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, "weight: expected float32");
        const float* add = floats(bias, "bias", {g.d});
        std::vector<double> scale(c, 1), rest(c, 0);
        if (mean) subtract.resize(c);
        if (std && !bytes) multiply.resize(c);
        for (int64_t i = 0; i < c; ++i) {
            const double of_mean = mean ? (bytes ? 255 * m[i] : m[i]) : 0;
            if (mean) subtract[i] = float(bytes && !g.padded ? ::nearbyint(of_mean) : of_mean);
            if (bytes && mean) rest[i] = g.padded ? 0 : of_mean - subtract[i];
            if (bytes && (mean || std)) scale[i] = 1 / (255 * (std ? d[i] : 1));
            if (std && !bytes) multiply[i] = float(1 / d[i]);
        }
        std::vector<float> v(g.d * k), own_bias(g.d);
        for (int64_t row = 0; row < g.d; ++row) {
            double shift = 0;
            for (int64_t i = 0; i < c; ++i)
                for (int64_t p = 0; p < volume; ++p) {
                    float sum = 0;  // of temporal slices, for a still image
                    for (int64_t t = 0; t < slices; ++t) sum += w[((row * c + i) * slices + t) * volume + p];
                    const float scaled = float(sum * scale[i]);
                    v[row * k + (s.channels_last ? p * c + i : i * volume + p)] = scaled;
                    shift += scaled * rest[i];
                }
            own_bias[row] = float((add ? add[row] : 0) - shift);
        }
        this->weight.emplace(v.data(), own_bias.data(), g.d, k, threads);
    }
};

const float* data_of(const std::vector<float>& of) { return of.empty() ? nullptr : of.data(); }

MMFUSE_CLONES
void add(float* to, const float* from, int64_t n) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) to[j] += from[j];
}

class PatchEmbed final : public Kernel {
  public:
    explicit PatchEmbed(const Node& node)
        : layout_(node), stem_eps_(node.number("stem_eps", 0)), pre_eps_(node.number("pre_eps", 0)) {
        for (const char* name : {"compute", "dtype"})
            expect(node.text(name, "float32") == "float32", name, ": expected float32, got ", node.text(name, ""));
        constant_ = true;
        for (const char* name : {"weight", "bias", "mean", "std"})
            constant_ &= !node.given(name) || bool(node.constant(name));
    }

    void compute(const Call& call) const override {
        const Array pixels = call.input("pixels"), weight = call.input("weight"), ids = call.input("ids_keep");
        const Geometry g = layout_.of(pixels, weight);
        const bool bytes = pixels.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
        expect(bytes || pixels.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT,
               "pixels: expected uint8 or float32, got ONNX's type ", int(pixels.type));
        const int64_t b = g.batch, d = g.d, patches = g.patches(), k = g.k();
        const Array prefix = call.input("prefix"), token = call.input("mask_token");
        const int64_t* kept = integers(ids, "ids_keep", {b, FREE});
        const int64_t n = kept ? ids.size(1) : patches, r = prefix ? prefix.size(0) : 0;
        const float* front = floats(prefix, "prefix", {r, d});
        const float* position = floats(call.input("position"), "position", {patches, d});
        const float* of_front = floats(call.input("prefix_position"), "prefix_position", {r, d});
        const float* masked = floats(token, "mask_token", {d});
        const float* type = floats(call.input("type_embed"), "type_embed", {d});
        const bool* mask = flags(call.input("mask"), "mask", {b, patches});
        const Norm stem{floats(call.input("stem_weight"), "stem_weight", {d}), floats(call.input("stem_bias"), "stem_bias", {d}),
                        true, stem_eps_};
        const Norm pre{floats(call.input("pre_weight"), "pre_weight", {d}), floats(call.input("pre_bias"), "pre_bias", {d}), true,
                       pre_eps_};
        expect(!mask == !masked, "mask and mask_token: expected both or neither");
        for (int64_t i = 0; kept && i < b * n; ++i)
            expect(kept[i] >= 0 && kept[i] < patches, "ids_keep: expected 0 to ", patches - 1, ", got ", kept[i]);
        float* out = call.output<float>(0, {b, r + n, d});
        if (b * (r + n) == 0) return;
        std::optional<Folded> now;
        const Folded& f = folded(g, bytes, call, weight, now);

        const int64_t step = std::clamp<int64_t>(BLOCK / (std::max<int64_t>(n, 1) * k * 4), 1, b), wide = (r + n) * d;
        const Scratch rows = call.scratch(step * n * k);
        for (int64_t i = 0; i < b; i += step) {
            const int64_t images = std::min(step, b - i);
            std::vector<int64_t> tokens;
            for (int64_t j = 0; kept && j < images * n; ++j) tokens.push_back(j / n * patches + kept[i * n + j]);
            const auto gather = [&](const auto* of) {
                write_rows(of + i * g.s.batch_stride, g.s, kept ? tokens.data() : nullptr, images * n, data_of(f.subtract),
                           data_of(f.multiply), rows.at, n * k, call.threads);
            };
            if (bytes)
                gather(static_cast<const uint8_t*>(pixels.at));
            else
                gather(static_cast<const float*>(pixels.at));
            f.weight->multiply(out + i * wide + r * d, wide, d, rows.at, n * k, k, images, n, call.threads);
        }
        call.threads(0, b * (r + n), ceil_div(16384, d), [&](int64_t begin, int64_t end) {
            std::vector<float> buffer(d);
            const auto normed = [&](float* row, const Norm& norm) {
                float mean, rstd;
                if (norm.gamma) forward_of(row, 1, d, false, norm, row, &mean, &rstd, buffer.data());
            };
            for (int64_t at = begin; at < end; ++at) {
                const int64_t image = at / (r + n), j = at % (r + n) - r;
                float* row = out + at * d;
                if (j < 0) {
                    std::copy_n(front + (j + r) * d, d, row);
                    if (of_front) add(row, of_front + (j + r) * d, d);
                } else {
                    const int64_t patch = kept ? kept[image * n + j] : j;
                    if (mask && mask[image * patches + patch])
                        std::copy_n(masked, d, row);
                    else
                        normed(row, stem);
                    if (position) add(row, position + patch * d, d);
                }
                if (type) add(row, type, d);
                normed(row, pre);
            }
        });
    }

  private:
    // the weight that the sizes of these pixels ask for; kept where it is constant, else made in `now`
    const Folded& folded(const Geometry& g, bool bytes, const Call& call, const Array& weight, std::optional<Folded>& now) const {
        const auto make = [&](std::optional<Folded>& to) {
            to.emplace(g, bytes, call.threads, weight, call.input("bias"), call.input("mean"), call.input("std"));
        };
        if (!constant_) {
            make(now);
            return *now;
        }
        std::call_once(once_[g.padded], [&] { make(kept_[g.padded]); });
        return *kept_[g.padded];
    }

    const Layout layout_;
    const float stem_eps_, pre_eps_;
    bool constant_;
    mutable std::once_flag once_[2];
    mutable std::optional<Folded> kept_[2];
};

}  // namespace

std::unique_ptr<Kernel> patch_embed(const Node& node) { return std::make_unique<PatchEmbed>(node); }

}  // namespace mmfuse::ort
