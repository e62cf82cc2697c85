// What csrc/ calls of the CUDA driver, its runtime and torch's CUDA shim: a GPU whose memory is the host's. In the
// environment, EMULATED_CAPABILITY (8 or 9) and EMULATED_MULTIPROCESSORS say which one, EMULATED_SHARED_KIB and
// EMULATED_THREADS what a multiprocessor has, if that is not a 8.0's or a 9.0's.
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdlib>
#include <cstring>
#include <string_view>

namespace {

int from_environment(const char* name, int otherwise) {
  const char* value = std::getenv(name);
  return value == nullptr ? otherwise : std::atoi(value);
}

// Accepts what the driver does, and of that only what tensor_map.h needs.
CUresult encode_tensor_map(CUtensorMap* result, CUtensorMapDataType dtype, cuuint32_t rank, void* data,
                           const cuuint64_t* sizes, const cuuint64_t* stride_bytes, const cuuint32_t* box,
                           const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                           CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  bool valid = dtype == CU_TENSOR_MAP_DATA_TYPE_FLOAT16 || dtype == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  valid &= rank == 4 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
  valid &= interleave == CU_TENSOR_MAP_INTERLEAVE_NONE && fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE;
  if (!valid) return CUDA_ERROR_INVALID_VALUE;
  emulator::TensorMap map{static_cast<char*>(data), {}, {}, static_cast<int>(box[0]), static_cast<int>(box[1])};
  for (int dim = 0; dim < 4; ++dim) {
    valid &= sizes[dim] >= 1 && sizes[dim] <= cuuint64_t{1} << 32 && steps[dim] == 1;
    valid &= box[dim] >= 1 && box[dim] <= (dim < 2 ? 256 : 1);
    map.sizes[dim] = static_cast<int64_t>(sizes[dim]);
  }
  for (int dim = 0; dim < 3; ++dim) {
    valid &= stride_bytes[dim] % 16 == 0 && stride_bytes[dim] >= 16 && stride_bytes[dim] < cuuint64_t{1} << 40;
    map.stride_bytes[dim] = static_cast<int64_t>(stride_bytes[dim]);
  }
  const cuuint32_t swizzled_bytes = swizzle == CU_TENSOR_MAP_SWIZZLE_128B  ? 128
                                    : swizzle == CU_TENSOR_MAP_SWIZZLE_64B ? 64
                                    : swizzle == CU_TENSOR_MAP_SWIZZLE_32B ? 32
                                                                           : 0;
  valid &= 2 * box[0] == swizzled_bytes && sizes[0] % 8 == 0;
  if (!valid) return CUDA_ERROR_INVALID_VALUE;
  static_assert(sizeof(map) <= sizeof(*result));
  std::memcpy(result, &map, sizeof(map));
  return CUDA_SUCCESS;
}

}  // namespace

extern "C" {

// How many warps' wgmma have been issued: tests see by it that the kernels of 9.0 ran.
__attribute__((visibility("default"))) int emulated_wgmmas() { return emulator::num_wgmmas; }
__attribute__((visibility("default"))) int64_t emulated_loaded_bytes() { return emulator::num_loaded_bytes; }
__attribute__((visibility("default"))) int64_t emulated_copied_bytes() { return emulator::num_copied_bytes; }
// How many kernels have been launched whose blocks have so many threads and more than 48 KiB of shared memory: tests
// see by it how many warps an attention kernel had.
__attribute__((visibility("default"))) int emulated_large_launches(unsigned threads) {
  return emulator::num_large_launches[threads];
}

// Whether warps take turns from the first on in the next launch's first block, or from the last on; and from there on
// in turn, from block to block and from launch to launch.
__attribute__((visibility("default"))) void emulated_first_warp_first(int first) {
  emulator::num_launches = first ? 0 : 1;
}
__attribute__((visibility("default"))) void emulated_last_block_first(int last) { emulator::last_block_first = last; }

cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "emulated error"; }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  if (attribute == cudaDevAttrMultiProcessorCount) {
    *value = from_environment("EMULATED_MULTIPROCESSORS", 132);
  } else if (attribute == cudaDevAttrMaxSharedMemoryPerMultiprocessor) {
    const int otherwise = from_environment("EMULATED_CAPABILITY", 8) == 8 ? 164 : 228;
    *value = from_environment("EMULATED_SHARED_KIB", otherwise) * 1024;
  } else if (attribute == cudaDevAttrMaxThreadsPerMultiProcessor) {
    *value = from_environment("EMULATED_THREADS", 2048);
  } else {
    *value = attribute == cudaDevAttrComputeCapabilityMajor ? from_environment("EMULATED_CAPABILITY", 8) : 0;
  }
  return cudaSuccess;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  const bool known = std::string_view(name) == "cuTensorMapEncodeTiled";
  *function = known ? reinterpret_cast<void*>(&encode_tensor_map) : nullptr;
  *found = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) { return *free = *total = size_t{80} << 30, cudaSuccess; }

cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}

AOTITorchError emulated_current_stream(int32_t, void** stream) { return *stream = nullptr, AOTI_TORCH_SUCCESS; }

// Memory that nobody has written is full of NaNs.
AOTITorchError emulated_empty_strided(int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                                      int32_t device_type, int32_t device_index, AtenTensorHandle* handle) {
  const AOTITorchError error =
      aoti_torch_empty_strided(dim, sizes, strides, dtype, device_type, device_index, handle);
  if (error != AOTI_TORCH_SUCCESS) return error;
  void* data = nullptr;
  int64_t bytes = 0;
  if (aoti_torch_get_data_ptr(*handle, &data) != 0 || aoti_torch_get_storage_size(*handle, &bytes) != 0) {
    return AOTI_TORCH_FAILURE;
  }
  if (bytes > 0) std::memset(data, 0xff, static_cast<size_t>(bytes));
  return AOTI_TORCH_SUCCESS;
}

}  // extern "C"
