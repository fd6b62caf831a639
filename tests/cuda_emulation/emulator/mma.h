// csrc/cuda/mma.h without tensor cores.
#pragma once

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"

namespace mmfuse {

struct Two {
    uint32_t first, second;
};

// <x, y> of the 16-bit numbers in two words each
template <class T>
float dot(Two x, Two y) {
    T a[4], b[4];
    std::memcpy(a, &x, sizeof(a)), std::memcpy(b, &y, sizeof(b));
    float sum = 0;
    for (int i = 0; i < 4; ++i) sum += float(a[i]) * float(b[i]);
    return sum;
}

template <class T>
void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, T*) {
    const int row = emulation::lane() / 4, column = emulation::lane() % 4 * 2;
    Two upper[4], lower[4], b[2][4];
    const auto read = [](const auto& words, int lanes, Two(&to)[4]) {
        for (int i = 0; i < 4; ++i) to[i] = words[4 * lanes + i];
    };
    read(emulation::words_of(~0u, Two{a0, a2}, EMULATION_PLACE), row, upper);
    read(emulation::words_of(~0u, Two{a1, a3}, EMULATION_PLACE), row, lower);
    const auto words = emulation::words_of(~0u, Two{b0, b1}, EMULATION_PLACE);
    read(words, column, b[0]), read(words, column + 1, b[1]);
    for (int e = 0; e < 4; ++e)
        for (int i = 0; i < 4; ++i) c[e] += dot<T>(e < 2 ? upper[i] : lower[i], b[e % 2][i]);
}

template <class T>
uint32_t packed(float x, float y, T*) {
    const T both[] = {T(x), T(y)};
    return std::bit_cast<uint32_t>(both);
}

}  // namespace mmfuse
