#include "sm80/backward.cuh"

namespace flash_cosine_sim {

template void launch_backward_sm80<Math::kFp32, 16>(const BackwardParams&, cudaStream_t);
template void launch_backward_sm80<Math::kFp32, 32>(const BackwardParams&, cudaStream_t);
template void launch_backward_sm80<Math::kFp32, 64>(const BackwardParams&, cudaStream_t);
template void launch_backward_sm80<Math::kFp32, 96>(const BackwardParams&, cudaStream_t);
template void launch_backward_sm80<Math::kFp32, 128>(const BackwardParams&, cudaStream_t);
template void launch_backward_sm80<Math::kFp32, 256>(const BackwardParams&, cudaStream_t);

}  // namespace flash_cosine_sim
