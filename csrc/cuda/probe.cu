// Whether a GPU can run the kernels: the library has code for some architectures, and its runtime wants a driver.
#include "launch.h"

namespace {
__global__ void nothing() {}
}  // namespace

// Null, or the runtime's reason why the kernels do not run on this GPU.
extern "C" __attribute__((visibility("default"))) const char* mmfuse_cuda_error(int device) {
    int before;
    cudaFuncAttributes attributes;
    cudaError_t error = cudaGetDevice(&before);
    if (error == cudaSuccess) error = cudaSetDevice(device);
    if (error == cudaSuccess) {
        error = cudaFuncGetAttributes(&attributes, nothing);
        cudaSetDevice(before);
    }
    if (error == cudaSuccess) return nullptr;
    cudaGetLastError();
    return cudaGetErrorString(error);
}
