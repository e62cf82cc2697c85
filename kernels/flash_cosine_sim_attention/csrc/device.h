// What the GPU is.
#pragma once

#include <vector>

#include "cuda_check.h"

namespace flash_cosine_sim {

struct DeviceProperties {
  int num_multiprocessors = 0;
  int compute_capability = 0;         // 90 is 9.0
  int shared_bytes = 0, threads = 0;  // of a multiprocessor, at most
};

// Of the current device. All devices are asked once; a static variable's initialisation is thread-safe.
inline const DeviceProperties& current_device() {
  static const std::vector<DeviceProperties> all = [] {
    int num_devices = 0;
    CUDA_CHECK(cudaGetDeviceCount(&num_devices));
    std::vector<DeviceProperties> result(num_devices);
    for (int index = 0; index < num_devices; ++index) {
      int major = 0, minor = 0;
      CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index));
      CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index));
      CUDA_CHECK(cudaDeviceGetAttribute(&result[index].num_multiprocessors, cudaDevAttrMultiProcessorCount, index));
      result[index].compute_capability = 10 * major + minor;
      CUDA_CHECK(
          cudaDeviceGetAttribute(&result[index].shared_bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, index));
      CUDA_CHECK(cudaDeviceGetAttribute(&result[index].threads, cudaDevAttrMaxThreadsPerMultiProcessor, index));
    }
    return result;
  }();
  int device = 0;
  CUDA_CHECK(cudaGetDevice(&device));
  return all.at(device);
}

}  // namespace flash_cosine_sim
