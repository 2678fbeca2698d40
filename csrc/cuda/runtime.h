// What every launch asks of the CUDA runtime: errors in its own words, the device, and the launch itself.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "../block/traversal.h"

namespace signadam::cuda {

// The runtime keeps the last error until someone asks for it: taken here, so that no later call reports it as its own.
inline void check(cudaError_t status, const char* doing) {
  if (status == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(std::string("CUDA failed ") + doing + ": " + cudaGetErrorString(status));
}

// A function of the driver, which is not linked: there may be none. Null where it cannot be had.
template <class Function>
Function driver_function(const char* name) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
  const auto status = cudaGetDriverEntryPointByVersion(name, &found, 11000, cudaEnableDefault, &result);
#elif CUDART_VERSION >= 12000
  const auto status = cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &result);
#else
  const auto status = cudaGetDriverEntryPoint(name, &found, cudaEnableDefault);
#endif
  if (status != cudaSuccess) cudaGetLastError();
  return status == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Function>(found) : nullptr;
}

// Selects a device where it is not current already, and puts back what was. Selecting the old device again would do,
// but makes a context on it where there is none, some hundred megabytes that nobody asked for; so the driver gets back
// the context that the thread had, or none.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    static const auto get_context = driver_function<int (*)(void**)>("cuCtxGetCurrent");
    if (get_context == nullptr || get_context(&before_) != 0) before_ = nullptr;
    int current = 0;
    check(cudaGetDevice(&current), "to read the current device");
    if (current == device) return;
    check(cudaSetDevice(device), "to select the device");
    has_moved_ = true;
  }
  ~DeviceGuard() {
    static const auto set_context = driver_function<int (*)(void*)>("cuCtxSetCurrent");
    // Without a context the thread is given one at its first use of the device.
    if ((has_moved_ || before_ == nullptr) && set_context != nullptr) set_context(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  bool has_moved_ = false;
  void* before_ = nullptr;  // the context that was current, or none
};

// Launches `blocks` blocks of so many threads on `stream` of `device`, and nothing where there are none.
inline void start(const void* kernel, int64_t blocks, void* arguments, int device, void* stream, const char* doing,
                  int threads = threads_per_block) {
  if (blocks == 0) return;
  const DeviceGuard guard(device);
  void* parameters[] = {arguments};
  // What it returns is of this launch; cudaGetLastError would also give an older error.
  check(cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)), parameters,
                         0, static_cast<cudaStream_t>(stream)),
        doing);
}

template <class Arguments>
void start(void (*kernel)(Arguments), int64_t blocks, Arguments& arguments, int device, void* stream, const char* doing,
           int threads = threads_per_block) {
  start(reinterpret_cast<const void*>(kernel), blocks, &arguments, device, stream, doing, threads);
}

}  // namespace signadam::cuda
