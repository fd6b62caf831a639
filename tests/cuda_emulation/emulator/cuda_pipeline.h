// Copies to shared memory that go on beside the thread: it has them when it has waited for them.
#pragma once

#include "cuda_runtime.h"

inline void __pipeline_memcpy_async(void* to, const void* from, size_t, size_t zeros) {
    emulation::copy_later(to, zeros ? nullptr : from);
}
inline void __pipeline_commit() { emulation::commit(); }
inline void __pipeline_wait_prior(size_t left) { emulation::wait(left); }
