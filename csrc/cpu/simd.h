// Elementary functions that the compiler vectorises inside a loop.
#pragma once

#include <bit>
#include <cstdint>

// one binary, compiled for three generations of x86; the loader picks
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#if __GNUC__ >= 12
#define MMFUSE_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MMFUSE_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#else
#define MMFUSE_CLONES
#endif
#define MMFUSE_INLINE inline __attribute__((always_inline))

namespace mmfuse {

struct Bfloat16 {
    uint16_t bits;
};

MMFUSE_INLINE float load(float x) { return x; }
MMFUSE_INLINE float load(Bfloat16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }
MMFUSE_INLINE void store(float* to, float x) { *to = x; }
MMFUSE_INLINE void store(Bfloat16* to, float x) {  // to the nearest, a tie to the even one
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    to->bits = x == x ? uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16) : 0x7fc0;
}

// Hides a constant: gcc turns a clamp to a known constant into masked arithmetic instead of a minimum.
MMFUSE_INLINE float opaque(float x) {
    __asm__("" : "+m"(x));
    return x;
}

// The power of two nearest to e^reference, as an exponent.
MMFUSE_INLINE float power_of_two(float reference) {
    constexpr float log2e = 1.44269504f, round = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    return reference * log2e + round - round;
}

// e^x 2^-k within 1.1 ulp (1.4 without FMA), |k| < 2^20: 2^(n-k) p(r), x = n log(2) + r, |r| <= log(2) / 2. A power of
// two takes out the size of e^x without the rounding of x - reference.
// 0 below 2^-126.5, inf above 2^127.5, NaN stays NaN. Make one per loop, outside of it.
struct Exp {
    const float low, high, round;

    MMFUSE_INLINE explicit Exp(float k = 0)
        : low(opaque((k - 127.0f) * 0.693147181f)),
          high(opaque((k + 128.0f) * 0.693147181f)),
          round(12582912.0f + 127.0f - k) {}

    MMFUSE_INLINE float operator()(float x) const {
        constexpr float log2e = 1.44269504f;
        constexpr float log2_high = 0.693359375f, log2_low = -2.12194440e-4f;  // n * log2_high is exact
        x = x < low ? low : x;
        x = x > high ? high : x;
        const float shifted = x * log2e + round, n = shifted - round;  // the low bits of shifted hold n - k + 127
        const float r = x - n * log2_high - n * log2_low;
        float p = 1.38368458e-3f;
        p = p * r + 8.37481581e-3f;
        p = p * r + 4.16682251e-2f;
        p = p * r + 1.66664198e-1f;
        p = p * r + 4.99999911e-1f;
        p = p * r + 1.0f;
        p = p * r + 1.0f;
        // a product, not an addition to the exponent bits: it keeps NaN, 0 and inf
        return p * std::bit_cast<float>(std::bit_cast<uint32_t>(shifted) << 23);
    }
};

// 2 atanh(w) for 0 <= w <= 1/3, relative error 4e-9 before rounding; log1p(e) = 2 atanh(e / (2 + e))
MMFUSE_INLINE float twice_atanh(float w) {
    const float z = w * w;
    float p = 2.81783342e-1f;
    p = p * z + 2.79606014e-1f;
    p = p * z + 4.00249094e-1f;
    p = p * z + 6.66663170e-1f;
    p = p * z + 2.0f;
    return w * p;
}

}  // namespace mmfuse
