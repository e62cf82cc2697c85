#include "sm80/forward_split.cuh"

namespace flash_cosine_sim {

template void launch_forward_split_sm80<Math::kFp32, 16>(const ForwardParams&, cudaStream_t);
template void launch_forward_split_sm80<Math::kFp32, 32>(const ForwardParams&, cudaStream_t);
template void launch_forward_split_sm80<Math::kFp32, 64>(const ForwardParams&, cudaStream_t);
template void launch_forward_split_sm80<Math::kFp32, 96>(const ForwardParams&, cudaStream_t);
template void launch_forward_split_sm80<Math::kFp32, 128>(const ForwardParams&, cudaStream_t);

}  // namespace flash_cosine_sim
