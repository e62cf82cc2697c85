// What dispatch.cpp and binding.cpp call of the CUDA runtime and of torch's CUDA shim: a GPU with the multiprocessors of
// an H100, whose memory is the host's.
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstring>

extern "C" {

cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "emulated error"; }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? 132 : attribute == cudaDevAttrComputeCapabilityMajor ? 8 : 0;
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
