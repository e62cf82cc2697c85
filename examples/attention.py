"""Causal cosine-sim attention with a learned scale, forward and backward: python examples/attention.py"""

import torch

from flash_cosine_sim_attention import flash_cosine_sim_attention, plain_cosine_sim_attention

torch.manual_seed(0)
device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
q, k, v, do = torch.randn(4, 2, 8, 512, 64, device=device, dtype=dtype).unbind()  # (batch, heads, seq_len, head_dim)
scale = torch.full((8,), 10.0, device=device)  # a learned temperature for each head, float32 beside bfloat16 q, k, v
inputs = [tensor.requires_grad_() for tensor in (q, k, v, scale)]

o = flash_cosine_sim_attention(q, k, v, scale=scale, causal=True)  # q and k are l2-normalised within
results = (o, *torch.autograd.grad(o, inputs, do))

exact = [tensor.detach().double().requires_grad_() for tensor in inputs]  # the specification on the same numbers
o_exact = plain_cosine_sim_attention(*exact[:3], scale=exact[3], causal=True)
expected = (o_exact, *torch.autograd.grad(o_exact, exact, do.double()))

try:  # by default the back end is "cuda" where it serves, else "sdpa"; one that is named and cannot serve raises
    flash_cosine_sim_attention(q, k, v, scale=scale, causal=True, backend="cuda")
    backend = "cuda"
except (ImportError, ValueError):
    backend = "sdpa"
print(f"o {tuple(o.shape)} in {o.dtype} on {device}, back end {backend}; relative errors:")
for name, result, wanted in zip(("o", "dq", "dk", "dv", "dscale"), results, expected, strict=True):
    print(f"  {name:6} {((result - wanted).norm() / wanted.norm()).item():.1e}")
