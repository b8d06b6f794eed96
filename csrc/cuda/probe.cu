#include "cuda/probe.h"

#include <cuda_runtime.h>

namespace em3::cuda {
namespace {

// Its attributes can be had on a device only if the module holds machine code, or PTX, for that device.
__global__ void nothing() {}

std::string text(cudaError_t status) {
    return std::string(cudaGetErrorString(status)) + " (" + cudaGetErrorName(status) + ")";
}

Device describe(int index) {
    Device device;
    cudaDeviceProp properties;
    cudaError_t status = cudaGetDeviceProperties(&properties, index);
    if (status == cudaSuccess) {
        device.name = properties.name;
        device.major = properties.major;
        device.minor = properties.minor;
        device.memory_bytes = properties.totalGlobalMem;
        status = cudaSetDevice(index);
    }
    if (status == cudaSuccess) {
        cudaFuncAttributes attributes;
        status = cudaFuncGetAttributes(&attributes, nothing);
    }
    if (status != cudaSuccess) device.error = text(status);
    cudaGetLastError();  // torch shares the context: leave no error behind that its next call would report
    return device;
}

}  // namespace

Probe probe() {
    Probe result;
    cudaDriverGetVersion(&result.driver_version);
    cudaRuntimeGetVersion(&result.runtime_version);
    int count = 0;
    cudaError_t status = cudaGetDeviceCount(&count);
    if (status != cudaSuccess) {
        result.error = text(status);
        cudaGetLastError();
        return result;
    }
    int current = 0;
    if (cudaGetDevice(&current) != cudaSuccess) current = 0;
    for (int index = 0; index < count; ++index) result.devices.push_back(describe(index));
    cudaSetDevice(current);
    return result;
}

}  // namespace em3::cuda
