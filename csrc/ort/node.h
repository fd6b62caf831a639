// onnxruntime's C interface as our kernels see it: the inputs, attributes, outputs, memory and threads of a node.
#pragma once

#include "../checks.h"

#include <algorithm>
#include <exception>
#include <initializer_list>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include <onnxruntime_c_api.h>

namespace mmfuse::ort {

extern const OrtApi* api;  // of the onnxruntime that has loaded the library

void checked(OrtStatus* status);  // raises what it says

constexpr int64_t FREE = -1;  // a size that is any

// A tensor of a node; `at` is null where it is not given.
struct Array {
    const void* at = nullptr;
    ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
    std::vector<int64_t> sizes;

    explicit operator bool() const { return at != nullptr; }
    int64_t size(size_t dim) const { return sizes[dim]; }
    int64_t numel() const;
};

Array array_of(const OrtValue* value);

// Raises unless the array has these sizes.
void check_sizes(const Array& array, const std::string& name, std::initializer_list<int64_t> sizes);

// The elements of an array of this type and these sizes; null where it is not given.
const float* floats(const Array& array, const std::string& name, std::initializer_list<int64_t> sizes);
const int64_t* integers(const Array& array, const std::string& name, std::initializer_list<int64_t> sizes);
std::vector<double> doubles(const Array& array, const std::string& name, int64_t count);  // of float32 or float64
const bool* flags(const Array& array, const std::string& name, std::initializer_list<int64_t> sizes);

// Which inputs a node has, of those that its operator may have: in the order of the operator's arguments.
struct Input {
    std::string name;
    size_t count;  // 0: it is not given; a list may have several
};

// What is known of a node before it runs.
class Node {
  public:
    Node(const OrtKernelInfo* info, const std::vector<Input>& inputs);

    int64_t integer(const char* name, int64_t missing) const;
    float number(const char* name, float missing) const;
    std::string text(const char* name, const char* missing) const;
    std::vector<int64_t> integers(const char* name) const;  // none where it is missing

    size_t given(const char* name) const { return range(name).second; }
    std::pair<size_t, size_t> range(const char* name) const;  // (first, count) among the node's inputs
    // The input's value, where it is a part of the file.
    Array constant(const char* name, size_t i = 0) const;

  private:
    const OrtKernelInfo* info_;
    std::vector<std::pair<std::string, std::pair<size_t, size_t>>> ranges_;
};

class Call;

// Work of any number of threads: those of the session, or of the caller alone.
struct Threads {
    const OrtKernelContext* context = nullptr;

    template <class F>
    void operator()(int64_t begin, int64_t end, int64_t grain, const F& f) const {
        constexpr int64_t MOST = 64;
        const int64_t n = end - begin;
        const int64_t parts = context ? std::min(ceil_div(n, std::max<int64_t>(grain, 1)), MOST) : 1;
        if (n <= 0) return;
        if (parts == 1) return f(begin, end);
        struct Work {
            const F& f;
            int64_t begin, n, parts;
            std::mutex mutex;
            std::exception_ptr error;
        } work{f, begin, n, parts, {}, {}};
        const auto part = [](void* data, size_t i) {
            auto& w = *static_cast<Work*>(data);
            const auto at = [&](int64_t p) { return w.begin + p * w.n / w.parts; };
            try {
                w.f(at(int64_t(i)), at(int64_t(i) + 1));
            } catch (...) {  // must not leave the session's thread
                const std::lock_guard lock(w.mutex);
                w.error = std::current_exception();
            }
        };
        checked(api->KernelContext_ParallelFor(context, part, size_t(parts), 0, &work));
        if (work.error) std::rethrow_exception(work.error);
    }
};

// Memory of the session for the time of a call.
class Scratch {
  public:
    Scratch(OrtAllocator* of, int64_t floats);
    ~Scratch();
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    float* at = nullptr;

  private:
    OrtAllocator* of_;
};

// One run of a node.
class Call {
  public:
    Call(const Node& node, OrtKernelContext* context) : threads{context}, node_(node), context_(context) {}

    Array input(const char* name, size_t i = 0) const;
    // Memory for an output of these sizes; null where nobody reads it.
    template <class T>
    T* output(size_t index, std::initializer_list<int64_t> sizes) const {
        return static_cast<T*>(output_of(index, sizes));
    }
    Scratch scratch(int64_t floats) const;

    const Threads threads;

  private:
    void* output_of(size_t index, std::initializer_list<int64_t> sizes) const;

    const Node& node_;
    OrtKernelContext* context_;
};

// What a node computes with; several threads may compute at once.
class Kernel {
  public:
    virtual ~Kernel() = default;
    virtual void compute(const Call& call) const = 0;
};

using Make = std::unique_ptr<Kernel> (*)(const Node&);

std::unique_ptr<Kernel> nearest_code(const Node&);
std::unique_ptr<Kernel> patch_embed(const Node&);
std::unique_ptr<Kernel> few_query_attention(const Node&);
std::unique_ptr<Kernel> routed_ffn(const Node&);

}  // namespace mmfuse::ort
