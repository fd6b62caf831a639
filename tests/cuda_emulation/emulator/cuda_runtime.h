// The part of CUDA that csrc/cuda uses, on a CPU. What a function does is in CUDA's own manual.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
// inlined, as by nvcc: GCC has no call for the access by which a structure becomes an argument
#define __device__ __attribute__((always_inline))
#define __launch_bounds__(...)

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) int2 {
    int x, y;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

using cudaStream_t = void*;
enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorNoKernelImageForDevice = 209,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
struct cudaFuncAttributes {};

cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);

namespace emulation {

struct Thread {
    dim3 index, block, threads, blocks;
};
extern const Thread* thread;  // the one that runs; null on the host

// where a call stands: another place in every instantiation of a template
using Place = const void*;
#define EMULATION_PLACE            \
    ([]() -> emulation::Place {    \
        static char here;          \
        return &here;              \
    }())

void barrier(Place place);

// The words of all lanes of the warp, once all are at this place.
const uint64_t* exchange(unsigned mask, uint64_t word, Place place);

template <class T>
const auto words_of(unsigned mask, T value, Place place) {
    struct Words {
        const uint64_t* at;
        T operator[](int lane) const {
            T value;
            std::memcpy(&value, at + lane, sizeof(T));
            return value;
        }
    };
    uint64_t word = 0;
    static_assert(sizeof(T) <= sizeof(word));
    std::memcpy(&word, &value, sizeof(T));
    return Words{exchange(mask, word, place)};
}

inline int lane() { return thread->index.x % 32; }

template <class T>
T shuffle(unsigned mask, T value, int from, Place place) {
    return words_of(mask, value, place)[from % 32];
}

template <class T>
T shuffle_up(unsigned mask, T value, int by, Place place) {
    return words_of(mask, value, place)[lane() < by ? lane() : lane() - by];
}

template <class T>
T shuffle_xor(unsigned mask, T value, int with, Place place) {
    return words_of(mask, value, place)[lane() ^ with];
}

template <class T, class F>
T reduce(unsigned mask, T value, const F& f, Place place) {
    const auto all = words_of(mask, value, place);
    T result = all[0];
    for (int i = 1; i < 32; ++i) result = f(result, all[i]);
    return result;
}

inline unsigned ballot(unsigned mask, bool vote, Place place) {
    const auto all = words_of(mask, vote, place);
    unsigned bits = 0;
    for (int i = 0; i < 32; ++i) bits |= unsigned(all[i]) << i;
    return bits;
}

// A thread's copies of 16 bytes, of zeros without `from`; those before its last `left` commits are waited for.
void copy_later(void* to, const void* from);
void commit();
void wait(size_t left);

// The block's own array that is declared at this place; without a place that of the launch.
void* shared_memory(size_t bytes, Place place);
void* dynamic_memory();
template <class T>
T& shared(Place place) {
    return *static_cast<T*>(shared_memory(sizeof(T), place));
}

struct Launch {
    const void* kernel;
    dim3 grid, block;
    size_t shared;
};
void run(const Launch& launch, const std::function<void()>& body);

// kernel<<<grid, block, shared, stream>>>
template <class... P>
auto launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared = 0, cudaStream_t = nullptr) {
    return [=](P... given) {
        run({reinterpret_cast<const void*>(kernel), grid, block, shared}, [&] { kernel(given...); });
    };
}

cudaError_t allow_shared(const void* kernel, size_t bytes);
cudaError_t has_code();

struct DeviceGuard {
    explicit DeviceGuard(int) {}
};

extern int fault;  // which of the planted faults is there

}  // namespace emulation

#define threadIdx (emulation::thread->index)
#define blockIdx (emulation::thread->block)
#define blockDim (emulation::thread->threads)
#define gridDim (emulation::thread->blocks)

#define __syncthreads() emulation::barrier(EMULATION_PLACE)
#define __shfl_sync(mask, value, lane) emulation::shuffle(mask, value, lane, EMULATION_PLACE)
#define __shfl_up_sync(mask, value, by) emulation::shuffle_up(mask, value, by, EMULATION_PLACE)
#define __shfl_xor_sync(mask, value, with) emulation::shuffle_xor(mask, value, with, EMULATION_PLACE)
#define __ballot_sync(mask, vote) emulation::ballot(mask, vote, EMULATION_PLACE)
#define __reduce_max_sync(mask, value) \
    emulation::reduce(mask, value, [](auto a, auto b) { return a > b ? a : b; }, EMULATION_PLACE)
#define __reduce_min_sync(mask, value) \
    emulation::reduce(mask, value, [](auto a, auto b) { return a < b ? a : b; }, EMULATION_PLACE)

using std::isnan;

template <class T>
T min(T a, T b) {
    return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
    return a < b ? b : a;
}
template <class T>
T __ldg(const T* p) {
    return *p;
}
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __expf(float x) { return expf(x); }
inline float __fdividef(float a, float b) { return b > 0x1p126f ? 0.0f : a / b; }
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(int(x)); }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    const uint64_t bytes = uint64_t(y) << 32 | x;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) result |= unsigned(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    return result;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel kernel, cudaFuncAttribute, int bytes) {
    return emulation::allow_shared(reinterpret_cast<const void*>(kernel), bytes);
}
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) {
    return emulation::has_code();
}
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
