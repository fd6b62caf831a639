// bfloat16 of CUDA: the upper half of a float, rounded to nearest, ties to even.
#pragma once

#include <bit>
#include <cstdint>

struct __nv_bfloat16 {
    uint16_t upper;
    __nv_bfloat16() = default;
    __nv_bfloat16(float x) {
        const auto bits = std::bit_cast<uint32_t>(x);
        upper = x != x ? 0x7fff : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
    operator float() const { return std::bit_cast<float>(uint32_t(upper) << 16); }
};
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return __nv_bfloat16(x); }
