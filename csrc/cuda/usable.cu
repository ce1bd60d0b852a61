// Whether the module holds code for a device, asked before the first launch would fail.
#include "device.cuh"

namespace pmm {

namespace {

__global__ void nothing() {}

}  // namespace

const char* unusable() {
    cudaFuncAttributes attributes;
    const cudaError_t error = cudaFuncGetAttributes(&attributes, nothing);
    // what earlier launches left is theirs to tell
    if (error != cudaErrorNoKernelImageForDevice && error != cudaErrorInvalidDeviceFunction &&
        error != cudaErrorUnsupportedPtxVersion && error != cudaErrorInsufficientDriver)
        return nullptr;
    // a later launch asks for the last error and must not find this one
    cudaGetLastError();
    return cudaGetErrorString(error);
}

}  // namespace pmm
