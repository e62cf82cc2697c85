#include "sm90/forward.cuh"

namespace flash_cosine_sim {

template void launch_forward_sm90<Math::kBf16, 32>(const ForwardParams&, cudaStream_t);
template void launch_forward_sm90<Math::kBf16, 64>(const ForwardParams&, cudaStream_t);
template void launch_forward_sm90<Math::kBf16, 96>(const ForwardParams&, cudaStream_t);
template void launch_forward_sm90<Math::kBf16, 128>(const ForwardParams&, cudaStream_t);
template void launch_forward_sm90<Math::kBf16, 256>(const ForwardParams&, cudaStream_t);

}  // namespace flash_cosine_sim
