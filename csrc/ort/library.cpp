// The library that onnxruntime loads: which nodes of the domain "mmfuse" our kernels compute, and how they are called.
//
// A node is named for its operator, the optional inputs that it has, and a number where a file has several of that name:
// MmfuseNearestCode_bias_2. The session's config entry "mmfuse.nodes" has the names that are to be registered.

#include "node.h"

#include <cctype>
#include <cstring>
#include <map>
#include <sstream>
#include <string_view>

namespace mmfuse::ort {

const OrtApi* api = nullptr;

namespace {

constexpr auto FLOAT = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, INT64 = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;

// "?": an input that may be missing, of a name for each that is there; "*": a list, of a name with its number; "#": any
// number of sizes that are known when the model runs, of no name.
struct Operator {
    const char* name;
    const char* inputs;
    std::vector<ONNXTensorElementDataType> outputs;
    Make make;
};

const Operator OPERATORS[] = {
    {"MmfuseNearestCode", "z weight scale? bias? mask?", {INT64}, nearest_code},
    {"MmfusePatchEmbed",
     "pixels weight bias? stem_weight? stem_bias? prefix? position? prefix_position? mask_token? type_embed? "
     "pre_weight? pre_bias? mask? ids_keep? mean? std?",
     {FLOAT},
     patch_embed},
    {"MmfuseFewQueryAttention", "q k v kv_index? lengths? cu_seqlens? longest# seed?", {FLOAT, FLOAT, FLOAT},
     few_query_attention},
    {"MmfuseRoutedFFN",
     "x weights_in* biases_in* inner_gammas* inner_betas* weights_out* biases_out* gammas* betas* bounds# offsets "
     "residual? scale? row_scale?",
     {FLOAT},
     routed_ffn},
};

constexpr size_t SIZES = ~size_t(0);  // as many as there are inputs besides

// Takes "_word" off the front, if another word or nothing follows.
bool take(std::string_view& rest, const std::string& word) {
    const size_t n = word.size() + 1;
    if (rest.size() < n || rest[0] != '_' || rest.substr(1, word.size()) != word) return false;
    if (rest.size() > n && rest[n] != '_') return false;
    rest.remove_prefix(n);
    return true;
}

// The inputs that a node of this name has; false where the name is none of the operator's.
bool inputs_of(const Operator& of, std::string_view name, std::vector<Input>& inputs) {
    if (name.substr(0, std::strlen(of.name)) != of.name) return false;
    std::string_view rest = name.substr(std::strlen(of.name));
    std::istringstream words(of.inputs);
    for (std::string word; words >> word;) {
        const char mark = word.back();
        if (mark == '?' || mark == '*' || mark == '#') word.pop_back();
        size_t count = mark == '#' ? SIZES : 1;
        if (mark == '?') count = take(rest, word);
        if (mark == '*') {
            count = 0;
            const std::string_view digits = rest.substr(std::min(rest.size(), word.size() + 1));
            if (!digits.empty() && std::isdigit(digits[0])) {
                const std::string number(digits.substr(0, digits.find('_')));
                if (number.size() < 5 && take(rest, word + number)) count = std::stoul(number);
            }
        }
        inputs.push_back({word, count});
    }
    if (!rest.empty() && rest[0] == '_') rest.remove_prefix(1);
    return std::all_of(rest.begin(), rest.end(), [](unsigned char c) { return std::isdigit(c); });
}

struct Running {
    Running(std::unique_ptr<Node> node, Make make) : node(std::move(node)), kernel(make(*this->node)) {}
    std::unique_ptr<Node> node;
    std::unique_ptr<Kernel> kernel;
};

template <class F>
OrtStatus* guarded(const char* name, const F& f) {
    try {
        f();
        return nullptr;
    } catch (const std::exception& error) {
        return api->CreateStatus(ORT_INVALID_ARGUMENT, (std::string(name) + ": " + error.what()).c_str());
    }
}

// A node's name as onnxruntime knows it.
struct Registered : OrtCustomOp {
    std::string name;
    const Operator* of;
    std::vector<Input> inputs;

    static const Registered* self(const OrtCustomOp* op) { return static_cast<const Registered*>(op); }

    Registered(std::string name, const Operator* of, std::vector<Input> inputs)
        : OrtCustomOp{}, name(std::move(name)), of(of), inputs(std::move(inputs)) {
        version = ORT_API_VERSION;
        GetName = [](const OrtCustomOp* op) { return self(op)->name.c_str(); };
        GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };
        // one input for all: a name says neither how many sizes there are nor of which types a node's tensors are
        GetInputTypeCount = [](const OrtCustomOp*) -> size_t { return 1; };
        GetInputType = [](const OrtCustomOp*, size_t) { return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED; };
        GetInputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_VARIADIC; };
        GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
        GetVariadicInputMinArity = [](const OrtCustomOp*) { return 1; };
        GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 0; };
        GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
        GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
        GetOutputTypeCount = [](const OrtCustomOp* op) { return self(op)->of->outputs.size(); };
        GetOutputType = [](const OrtCustomOp* op, size_t i) { return self(op)->of->outputs[i]; };
        GetOutputCharacteristic = [](const OrtCustomOp*, size_t i) {
            return i == 0 ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;  // what nobody reads a file leaves out
        };
        GetStartVersion = [](const OrtCustomOp*) { return 1; };
        GetEndVersion = [](const OrtCustomOp*) { return 1; };
        CreateKernelV2 = [](const OrtCustomOp* op, const OrtApi*, const OrtKernelInfo* info, void** kernel) {
            return guarded(self(op)->name.c_str(), [&] {
                *kernel = new Running(std::make_unique<Node>(info, self(op)->inputs), self(op)->of->make);
            });
        };
        KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
            const auto* running = static_cast<const Running*>(kernel);
            return guarded("mmfuse", [&] { running->kernel->compute(Call(*running->node, context)); });
        };
        KernelDestroy = [](void* kernel) { delete static_cast<Running*>(kernel); };
    }
};

// Of a list of names: the domain that has them. It lives as long as the process, as sessions refer to it.
OrtCustomOpDomain* domain_of(const std::string& names) {
    static std::mutex mutex;
    static std::map<std::string, OrtCustomOpDomain*> domains;
    const std::lock_guard lock(mutex);
    if (const auto known = domains.find(names); known != domains.end()) return known->second;
    std::vector<std::unique_ptr<Registered>> made;
    std::istringstream words(names);
    for (std::string name; std::getline(words, name, ',');) {
        std::vector<Input> inputs;
        const auto* of = std::find_if(std::begin(OPERATORS), std::end(OPERATORS), [&](const Operator& each) {
            inputs.clear();
            return inputs_of(each, name, inputs);
        });
        expect(of != std::end(OPERATORS), "mmfuse.nodes: expected names of nodes that there is a kernel for, got ", name);
        made.push_back(std::make_unique<Registered>(name, of, inputs));
    }
    OrtCustomOpDomain* domain = nullptr;
    checked(api->CreateCustomOpDomain("mmfuse", &domain));
    for (auto& each : made) checked(api->CustomOpDomain_Add(domain, each.release()));
    return domains[names] = domain;
}

void add(OrtSessionOptions* options) {
    constexpr const char* KEY = "mmfuse.nodes";
    int has = 0;
    checked(api->HasSessionConfigEntry(options, KEY, &has));
    expect(has, "the session's config entry \"mmfuse.nodes\" is missing, expected the names of the nodes to register, with "
                "commas between");
    size_t size = 0;
    checked(api->GetSessionConfigEntry(options, KEY, nullptr, &size));
    std::string names(size, '\0');
    checked(api->GetSessionConfigEntry(options, KEY, names.data(), &size));
    names.resize(std::strlen(names.c_str()));
    checked(api->AddCustomOpDomain(options, domain_of(names)));
}

}  // namespace

// -------------------------------------------------------------------------------------------------------------------

void checked(OrtStatus* status) {
    if (status == nullptr) return;
    const std::string message = api->GetErrorMessage(status);
    api->ReleaseStatus(status);
    throw std::runtime_error(message);
}

int64_t Array::numel() const {
    int64_t all = 1;
    for (const int64_t n : sizes) all *= n;
    return all;
}

Array array_of(const OrtValue* value) {
    Array array;
    OrtTensorTypeAndShapeInfo* info = nullptr;
    checked(api->GetTensorTypeAndShape(value, &info));
    const std::unique_ptr<OrtTensorTypeAndShapeInfo, void (*)(OrtTensorTypeAndShapeInfo*)> held(
        info, [](OrtTensorTypeAndShapeInfo* of) { api->ReleaseTensorTypeAndShapeInfo(of); });
    size_t dims = 0;
    checked(api->GetTensorElementType(info, &array.type));
    checked(api->GetDimensionsCount(info, &dims));
    array.sizes.resize(dims);
    checked(api->GetDimensions(info, array.sizes.data(), dims));
    void* data = nullptr;
    checked(api->GetTensorMutableData(const_cast<OrtValue*>(value), &data));
    static const char nothing = 0;  // what is empty may have no memory, and is given all the same
    array.at = data ? data : &nothing;
    return array;
}

void check_sizes(const Array& array, const std::string& name, std::initializer_list<int64_t> sizes) {
    const auto fits = [](int64_t has, int64_t wanted) { return wanted == FREE || has == wanted; };
    if (std::equal(array.sizes.begin(), array.sizes.end(), sizes.begin(), sizes.end(), fits)) return;
    const auto listed = [](const auto& of) {
        std::string all;
        for (const int64_t n : of) all += (all.empty() ? "" : ", ") + (n == FREE ? "any" : std::to_string(n));
        return all;
    };
    expect(false, name, ": expected sizes [", listed(sizes), "], got [", listed(array.sizes), "]");
}

namespace {

template <class T>
const T* elements(const Array& array, const std::string& name, std::initializer_list<int64_t> sizes,
                  ONNXTensorElementDataType type, const char* expected) {
    if (!array) return nullptr;
    check_sizes(array, name, sizes);
    expect(array.type == type, name, ": expected ", expected, ", got ONNX's type ", int(array.type));
    return static_cast<const T*>(array.at);
}

}  // namespace

const float* floats(const Array& array, const std::string& name, std::initializer_list<int64_t> sizes) {
    return elements<float>(array, name, sizes, FLOAT, "float32");
}

const int64_t* integers(const Array& array, const std::string& name, std::initializer_list<int64_t> sizes) {
    return elements<int64_t>(array, name, sizes, INT64, "int64");
}

std::vector<double> doubles(const Array& array, const std::string& name, int64_t count) {
    if (!array) return {};
    if (array.type != ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE) {
        const float* of = floats(array, name, {count});
        return {of, of + count};
    }
    check_sizes(array, name, {count});
    const auto* of = static_cast<const double*>(array.at);
    return {of, of + count};
}

const bool* flags(const Array& array, const std::string& name, std::initializer_list<int64_t> sizes) {
    return elements<bool>(array, name, sizes, ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL, "bool");
}

// -------------------------------------------------------------------------------------------------------------------

Node::Node(const OrtKernelInfo* info, const std::vector<Input>& inputs) : info_(info) {
    size_t count = 0, named = 0;
    checked(api->KernelInfo_GetInputCount(info, &count));
    for (const Input& input : inputs) named += input.count == SIZES ? 0 : input.count;
    const bool sizes = std::any_of(inputs.begin(), inputs.end(), [](const Input& i) { return i.count == SIZES; });
    expect(sizes ? count >= named : count == named, "expected ", named, " inputs by the node's name, got ", count);
    size_t first = 0;
    for (const Input& input : inputs) {
        const size_t own = input.count == SIZES ? count - named : input.count;
        ranges_.push_back({input.name, {first, own}});
        first += own;
    }
}

std::pair<size_t, size_t> Node::range(const char* name) const {
    for (const auto& [own, range] : ranges_)
        if (own == name) return range;
    throw std::logic_error(name);
}

namespace {

// An attribute; what is missing is no error.
template <class F>
bool found(const F& get) {
    OrtStatus* status = get();
    if (status == nullptr) return true;
    api->ReleaseStatus(status);
    return false;
}

}  // namespace

int64_t Node::integer(const char* name, int64_t missing) const {
    int64_t value = 0;
    return found([&] { return api->KernelInfoGetAttribute_int64(info_, name, &value); }) ? value : missing;
}

float Node::number(const char* name, float missing) const {
    float value = 0;
    return found([&] { return api->KernelInfoGetAttribute_float(info_, name, &value); }) ? value : missing;
}

std::string Node::text(const char* name, const char* missing) const {
    size_t size = 0;
    if (!found([&] { return api->KernelInfoGetAttribute_string(info_, name, nullptr, &size); })) return missing;
    std::string value(size, '\0');
    checked(api->KernelInfoGetAttribute_string(info_, name, value.data(), &size));
    value.resize(std::strlen(value.c_str()));
    return value;
}

std::vector<int64_t> Node::integers(const char* name) const {
    size_t size = 0;
    if (!found([&] { return api->KernelInfoGetAttributeArray_int64(info_, name, nullptr, &size); })) return {};
    std::vector<int64_t> values(size);
    checked(api->KernelInfoGetAttributeArray_int64(info_, name, values.data(), &size));
    return values;
}

Array Node::constant(const char* name, size_t i) const {
    const auto [first, count] = range(name);
    int is_constant = 0;
    const OrtValue* value = nullptr;
    if (i < count) checked(api->KernelInfoGetConstantInput_tensor(info_, first + i, &is_constant, &value));
    return is_constant && value ? array_of(value) : Array{};
}

Scratch::Scratch(OrtAllocator* of, int64_t floats) : of_(of) {
    void* memory = nullptr;
    checked(api->AllocatorAlloc(of, size_t(std::max<int64_t>(floats, 1)) * sizeof(float), &memory));
    at = static_cast<float*>(memory);
}

Scratch::~Scratch() {
    if (OrtStatus* status = api->AllocatorFree(of_, at)) api->ReleaseStatus(status);
}

Array Call::input(const char* name, size_t i) const {
    const auto [first, count] = node_.range(name);
    if (i >= count) return {};
    const OrtValue* value = nullptr;
    checked(api->KernelContext_GetInput(context_, first + i, &value));
    return array_of(value);
}

Scratch Call::scratch(int64_t floats) const {
    OrtMemoryInfo* info = nullptr;
    checked(api->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &info));
    const std::unique_ptr<OrtMemoryInfo, void (*)(OrtMemoryInfo*)> held(
        info, [](OrtMemoryInfo* of) { api->ReleaseMemoryInfo(of); });
    OrtAllocator* allocator = nullptr;
    checked(api->KernelContext_GetAllocator(context_, info, &allocator));
    return Scratch(allocator, floats);
}

void* Call::output_of(size_t index, std::initializer_list<int64_t> sizes) const {
    size_t count = 0;
    checked(api->KernelContext_GetOutputCount(context_, &count));
    if (index >= count) return nullptr;
    OrtValue* value = nullptr;
    checked(api->KernelContext_GetOutput(context_, index, sizes.begin(), sizes.size(), &value));
    if (value == nullptr) return nullptr;
    void* data = nullptr;
    checked(api->GetTensorMutableData(value, &data));
    return data;
}

}  // namespace mmfuse::ort

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                               const OrtApiBase* base) {
    using namespace mmfuse::ort;
    api = base->GetApi(ORT_API_VERSION);
    if (api == nullptr) {
        const std::string why = std::string("mmfuse: onnxruntime is ") + base->GetVersionString() +
                                ", expected one of API version " + std::to_string(ORT_API_VERSION) + " or later";
        return base->GetApi(1)->CreateStatus(ORT_FAIL, why.c_str());
    }
    return guarded("mmfuse", [&] { add(options); });
}
