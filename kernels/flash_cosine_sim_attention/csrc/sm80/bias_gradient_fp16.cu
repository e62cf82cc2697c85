#include "sm80/bias_gradient.cuh"

namespace flash_cosine_sim {

template void launch_bias_gradient_sm80<Math::kFp16, 16>(const BackwardParams&, cudaStream_t);
template void launch_bias_gradient_sm80<Math::kFp16, 32>(const BackwardParams&, cudaStream_t);
template void launch_bias_gradient_sm80<Math::kFp16, 64>(const BackwardParams&, cudaStream_t);
template void launch_bias_gradient_sm80<Math::kFp16, 96>(const BackwardParams&, cudaStream_t);
template void launch_bias_gradient_sm80<Math::kFp16, 128>(const BackwardParams&, cudaStream_t);
template void launch_bias_gradient_sm80<Math::kFp16, 256>(const BackwardParams&, cudaStream_t);

}  // namespace flash_cosine_sim
