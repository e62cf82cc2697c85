#include "sm80/forward.cuh"

namespace flash_cosine_sim {

template void launch_forward_sm80<Math::kFp16WideP, 16>(const ForwardParams&, cudaStream_t);
template void launch_forward_sm80<Math::kFp16WideP, 32>(const ForwardParams&, cudaStream_t);
template void launch_forward_sm80<Math::kFp16WideP, 64>(const ForwardParams&, cudaStream_t);
template void launch_forward_sm80<Math::kFp16WideP, 96>(const ForwardParams&, cudaStream_t);
template void launch_forward_sm80<Math::kFp16WideP, 128>(const ForwardParams&, cudaStream_t);
template void launch_forward_sm80<Math::kFp16WideP, 256>(const ForwardParams&, cudaStream_t);

}  // namespace flash_cosine_sim
