// What csrc/cuda asks of the CUDA runtime, without one: a process with some devices, of which it remembers who
// has a context, which is current, the last error, and what was launched.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#define CUDART_VERSION 13000
#define __global__
#define __device__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)

using std::max;
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned n) : x(n) {}
};
inline dim3 threadIdx(0), blockIdx(0);
inline void __syncthreads() {}
inline int __syncthreads_or(int x) { return x; }
inline void __threadfence() {}
inline uint32_t __shfl_xor_sync(unsigned, uint32_t x, int) { return x; }
inline uint32_t atomicAdd(uint32_t* x, uint32_t n) { return std::exchange(*x, *x + n); }

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidDevice = 101, cudaErrorNotReady = 600 };
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess = 0, cudaDriverEntryPointSymbolNotFound = 1 };
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor, cudaDevAttrComputeCapabilityMinor };
constexpr unsigned long long cudaEnableDefault = 0;
using cudaStream_t = void*;
struct cudaFuncAttributes {
  int numRegs, ptxVersion, binaryVersion;
  std::size_t sharedSizeBytes, localSizeBytes;
};

struct FakeLaunch {
  const void* function;
  unsigned blocks, threads;
  std::size_t dynamic_shared;
  std::vector<unsigned char> parameters;
};

struct FakeRuntime {
  int devices = 2;
  bool context_of[8] = {};
  int context = -1;  // device of the current context; -1: there is none
  int selected = 0;  // what the runtime takes where there is none
  cudaError_t last_error = cudaSuccess;
  cudaError_t launch_result = cudaSuccess;
  int selections = 0, launched_on = -1;
  std::vector<FakeLaunch> launches;

  cudaError_t give(cudaError_t status) {
    if (status != cudaSuccess) last_error = status;
    return status;
  }
  // Whatever needs a context makes one on the current device.
  int current() {
    if (context < 0) {
      context = selected;
      context_of[context] = true;
    }
    return context;
  }
};
inline FakeRuntime fake;

inline cudaError_t cudaGetLastError() { return std::exchange(fake.last_error, cudaSuccess); }
inline const char* cudaGetErrorString(cudaError_t status) {
  return status == cudaErrorInvalidDevice ? "invalid device ordinal" : "invalid argument";
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = fake.context < 0 ? fake.selected : fake.context;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  ++fake.selections;
  if (device < 0 || device >= fake.devices) return fake.give(cudaErrorInvalidDevice);
  fake.selected = fake.context = device;
  fake.context_of[device] = true;
  return cudaSuccess;
}
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = fake.devices;
  return cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 9;
  return cudaSuccess;
}
template <class Function>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Function) {
  fake.current();
  *attributes = {};
  return cudaSuccess;
}
template <class Function>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Function, int, std::size_t) {
  *blocks = 1;
  return cudaSuccess;
}

inline int fake_get_context(void** context) {
  *context = fake.context < 0 ? nullptr : &fake.context_of[fake.context];
  return 0;
}
inline int fake_set_context(void* context) {
  fake.context = context == nullptr ? -1 : static_cast<int>(static_cast<bool*>(context) - fake.context_of);
  return 0;
}
inline cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** found, unsigned, unsigned long long,
                                                    cudaDriverEntryPointQueryResult* result) {
  const std::string wanted = name;
  *found = wanted == "cuCtxGetCurrent"   ? reinterpret_cast<void*>(&fake_get_context)
           : wanted == "cuCtxSetCurrent" ? reinterpret_cast<void*>(&fake_set_context)
                                         : nullptr;
  *result = *found == nullptr ? cudaDriverEntryPointSymbolNotFound : cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

std::size_t fake_parameter_bytes(const void* function);
inline cudaError_t cudaLaunchKernel(const void* function, dim3 blocks, dim3 threads, void** parameters,
                                    std::size_t dynamic_shared, cudaStream_t) {
  if (fake.launch_result != cudaSuccess) return fake.give(fake.launch_result);
  fake.launched_on = fake.current();
  const auto* bytes = static_cast<const unsigned char*>(parameters[0]);
  fake.launches.push_back(
      {function, blocks.x, threads.x, dynamic_shared, {bytes, bytes + fake_parameter_bytes(function)}});
  return cudaSuccess;
}
