// What every launch needs.
#pragma once

#include "../tensor.h"

#include <cuda_runtime.h>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

namespace mmfuse {

inline cudaStream_t current_stream_of(const Tensor& t) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
    return static_cast<cudaStream_t>(stream);
}

// The runtime keeps an error until it is asked for: the next call is not to find this one's.
inline void check(cudaError_t error) {
    if (error == cudaSuccess) return;
    cudaGetLastError();
    STD_TORCH_CHECK(false, cudaGetErrorString(error));
}

}  // namespace mmfuse
