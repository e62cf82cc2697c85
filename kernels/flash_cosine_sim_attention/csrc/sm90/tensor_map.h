// Tensor maps: how TMA sees a Tensor. Made on the host for every call, handed to the kernel as a constant.
#pragma once

#include <cuda.h>
#include <cudaTypedefs.h>

#include <string>

#include "attention.h"
#include "cuda_check.h"

namespace flash_cosine_sim {

// libcuda is not linked, for the library must load where there is no driver.
inline PFN_cuTensorMapEncodeTiled_v12000 find_tensor_map_encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
#if CUDART_VERSION >= 12050
  CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found));
#else
  CUDA_CHECK(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found));
#endif
  if (found != cudaDriverEntryPointSuccess || function == nullptr) {
    throw std::runtime_error("the CUDA driver has no cuTensorMapEncodeTiled: it is older than 12.0");
  }
  return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
}

// Dimensions (column, row, head, batch); a copy moves box_rows rows of box_columns 16-bit elements, which lie in
// shared memory swizzled by tile.cuh's swizzle<2 * box_columns>.
inline CUtensorMap make_tensor_map(const Tensor& tensor, DType dtype, int batch, int num_heads, int num_rows,
                                   int head_dim, int box_columns, int box_rows) {
  static const auto encode = find_tensor_map_encoder();
  const uint64_t row_bytes = 2 * uint64_t(head_dim);
  // The stride of a dimension of size 1 may be anything, but must be a multiple of 16 bytes here.
  const auto stride_bytes = [&](int64_t stride, int size) { return size == 1 ? row_bytes : 2 * uint64_t(stride); };
  const cuuint64_t sizes[] = {cuuint64_t(head_dim), cuuint64_t(num_rows), cuuint64_t(num_heads), cuuint64_t(batch)};
  const cuuint64_t strides[] = {stride_bytes(tensor.stride_row, num_rows), stride_bytes(tensor.stride_head, num_heads),
                                stride_bytes(tensor.stride_batch, batch)};
  const cuuint32_t box[] = {cuuint32_t(box_columns), cuuint32_t(box_rows), 1, 1};
  const cuuint32_t steps[] = {1, 1, 1, 1};
  const CUtensorMapSwizzle swizzle = box_columns == 64   ? CU_TENSOR_MAP_SWIZZLE_128B
                                     : box_columns == 32 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                         : CU_TENSOR_MAP_SWIZZLE_32B;
  CUtensorMap map;
  const CUresult result =
      encode(&map, dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4,
             tensor.data, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("cuTensorMapEncodeTiled failed with error " + std::to_string(int(result)));
  }
  return map;
}

}  // namespace flash_cosine_sim
