// The one macro: a failed CUDA call becomes an exception that names it.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

#define CUDA_CHECK(call)                                                                               \
  do {                                                                                                 \
    const cudaError_t cuda_check_error = (call);                                                       \
    if (cuda_check_error != cudaSuccess) {                                                             \
      throw std::runtime_error(std::string(#call " failed: ") + cudaGetErrorString(cuda_check_error)); \
    }                                                                                                  \
  } while (false)
