"""The operators torch.ops.flash_cosine_sim_attention.{forward, partials, backward}.

Schemas, autograd, autocast, fake tensors and FLOP formulas live here and need no build. On the CPU the closed
forms of reference.py serve; on CUDA the kernels of csrc/, which a compiled library `_C*.so` in this directory
registers for the same schemas when it is loaded.

    q, o, do, numerator          (batch, num_heads, seq_len_q, head_dim)
    k, v                         (batch, num_kv_heads, seq_len_k, head_dim)
    mask                         bool (batch, seq_len_k)
    attn_bias                    in q's dtype, broadcastable to (batch, num_heads, seq_len_q, seq_len_k)
    scale                        float32 (1,) or (num_heads,)
    row_sum_log2, denominator    float32 (batch, num_heads, seq_len_q)

row_sum_log2 is the log2 of the unshifted row sum, -inf where no key is visible; the numerator is float32 too.
All outputs are contiguous. The operators do not validate: interface.py did.
"""

from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .reference import LOG2_E, compute_dtype, reference_backward, reference_forward, reference_partials

NAMESPACE = "flash_cosine_sim_attention"
_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? attn_bias, Tensor scale"
_OPTIONS = "int groups, bool causal, bool l2norm_qk"

_library = torch.library.Library(NAMESPACE, "DEF")
_library.define(f"forward({_INPUTS}, {_OPTIONS}) -> (Tensor o, Tensor row_sum_log2)")
_library.define(f"partials({_INPUTS}, {_OPTIONS}) -> (Tensor numerator, Tensor denominator)")
# drow_sum_log2 joins the row statistic delta = rowsum(do * o) - log2(e) * drow_sum_log2; None is zero.
# attn_bias_grad=False leaves dattn_bias empty: a kernel need not store it.
_library.define(
    f"backward(Tensor do, {_INPUTS}, Tensor o, Tensor row_sum_log2, Tensor? drow_sum_log2, {_OPTIONS}, "
    "bool attn_bias_grad, bool deterministic) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dattn_bias, Tensor dscale)"
)
_ops = torch.ops.flash_cosine_sim_attention

_kernels_error: str | None = "no compiled library in the package directory"


def load_kernels(directory: Path = Path(__file__).parent) -> None:
    """Load the compiled library `_C*.so` of `directory`, if there is one; called once, at import.

    Never raises: a library that does not load is reported by `kernels_error`, hence where it is asked for.
    """
    global _kernels_error
    libraries = sorted(directory.glob("_C*.so"))
    if not libraries:
        return
    try:
        torch.ops.load_library(str(libraries[0]))
    except (OSError, RuntimeError) as error:
        _kernels_error = f"{libraries[0].name} does not load: {error}"
    else:
        _kernels_error = None


def kernels_available() -> bool:
    """Whether the compiled CUDA kernels are loaded. It asks no device."""
    return _kernels_error is None


def kernels_error() -> str | None:
    """Why the compiled CUDA kernels are not loaded; None where they are."""
    return _kernels_error


def kernel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None,
    attn_bias: Tensor | None,
    scale: float | Tensor,
    groups: int,
    causal: bool,
    l2norm_qk: bool,
    return_partials: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention by the operators, on 4-D tensors as normalised by interface.py."""
    if not isinstance(scale, Tensor):
        # A fill kernel writes it: no copy from the host, so no synchronisation, and CUDA graphs capture it.
        scale = torch.full((1,), scale, dtype=compute_dtype(q.dtype), device=q.device)
    operator = _ops.partials if return_partials else _ops.forward
    result = operator(q, k, v, mask, attn_bias, scale, groups, causal, l2norm_qk)
    return result if return_partials else result[0]


def _backward_cpu(do, q, k, v, mask, attn_bias, scale, o, row_sum_log2, drow_sum_log2, *options):
    *options, _deterministic = options  # the reference always is
    return reference_backward(do, q, k, v, mask, attn_bias, scale, o, row_sum_log2, drow_sum_log2, *options)


_library.impl("forward", reference_forward, "CPU")
_library.impl("partials", reference_partials, "CPU")
_library.impl("backward", _backward_cpu, "CPU")


# Fake tensors: shapes, dtypes and strides without data, for torch.compile, torch.export and the meta device.


@torch.library.register_fake(f"{NAMESPACE}::forward", lib=_library)
def _forward_fake(q, *_inputs):
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=compute_dtype(q.dtype))


@torch.library.register_fake(f"{NAMESPACE}::partials", lib=_library)
def _partials_fake(q, *_inputs):
    dtype = compute_dtype(q.dtype)
    return q.new_empty(q.shape, dtype=dtype), q.new_empty(q.shape[:-1], dtype=dtype)


@torch.library.register_fake(f"{NAMESPACE}::backward", lib=_library)
def _backward_fake(_do, q, k, v, _mask, attn_bias, scale, *options):
    attn_bias_grad = options[-2]
    bias_shape = attn_bias.shape if attn_bias is not None and attn_bias_grad else (0,)
    bias_dtype = q.dtype if attn_bias is None else attn_bias.dtype
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        q.new_empty(bias_shape, dtype=bias_dtype),
        scale.new_empty(scale.shape),
    )


# Autograd: only the inputs, the output and one number per row are saved.


def _save_for_backward(ctx, inputs, output):
    *tensors, groups, causal, l2norm_qk = inputs
    ctx.save_for_backward(*tensors, *output)  # mask and attn_bias may be None
    ctx.options = groups, causal, l2norm_qk
    ctx.set_materialize_grads(False)


def _input_grads(ctx, inputs, do, o, row_sum_log2, drow_sum_log2):
    """Gradients of the nine inputs, given those of o and of row_sum_log2."""
    q, k, v, mask, attn_bias, scale = inputs
    attn_bias_grad = attn_bias is not None and ctx.needs_input_grad[4]
    dq, dk, dv, dattn_bias, dscale = _ops.backward(
        do,
        q,
        k,
        v,
        mask,
        attn_bias,
        scale,
        o,
        row_sum_log2,
        drow_sum_log2,
        *ctx.options,
        attn_bias_grad,
        torch.are_deterministic_algorithms_enabled(),
    )
    return dq, dk, dv, None, dattn_bias if attn_bias_grad else None, dscale, None, None, None


def _forward_autograd(ctx, do, drow_sum_log2):
    *inputs, o, row_sum_log2 = ctx.saved_tensors  # read once: activation checkpointing allows no more
    do = torch.zeros_like(o) if do is None else do
    return _input_grads(ctx, inputs, do, o, row_sum_log2, drow_sum_log2)


def _partials_autograd(ctx, dnumerator, ddenominator):
    """With numerator = o * 2^L and denominator = 2^L, L = row_sum_log2, the chain rule leads to o and L.

    do = denominator * dnumerator is the well-scaled choice: dnumerator carries one over the total row sum.
    """
    *inputs, numerator, denominator = ctx.saved_tensors
    dnumerator = torch.zeros_like(numerator) if dnumerator is None else dnumerator
    ddenominator = torch.zeros_like(denominator) if ddenominator is None else ddenominator
    dtype = inputs[0].dtype
    o = numerator / denominator.masked_fill(denominator == 0, 1).unsqueeze(-1)
    do = dnumerator * denominator.unsqueeze(-1)
    drow_sum_log2 = ((numerator * dnumerator).sum(-1) + denominator * ddenominator) / LOG2_E
    return _input_grads(ctx, inputs, do.to(dtype), o.to(dtype), denominator.log2(), drow_sum_log2)


def _double_backward(_ctx, *_grads):
    raise RuntimeError(
        "flash_cosine_sim_attention's operators have no double backward; use backend='reference' (or "
        "plain_cosine_sim_attention), which is plain PyTorch, where gradients of gradients are needed"
    )


torch.library.register_autograd(
    f"{NAMESPACE}::forward", _forward_autograd, setup_context=_save_for_backward, lib=_library
)
torch.library.register_autograd(
    f"{NAMESPACE}::partials", _partials_autograd, setup_context=_save_for_backward, lib=_library
)
torch.library.register_autograd(f"{NAMESPACE}::backward", _double_backward, lib=_library)


# Autocast: torch.library.register_autocast would cast every tensor, but a learned scale stays float32.


def _autocast(operator, device_type: str):
    def cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        return tensor if tensor is None or tensor.dtype == torch.float64 else tensor.to(dtype)

    def kernel(q, k, v, mask, attn_bias, scale, *options):
        dtype = torch.get_autocast_dtype(device_type)
        with torch.autocast(device_type, enabled=False):
            q, k, v, attn_bias = (cast(tensor, dtype) for tensor in (q, k, v, attn_bias))
            return operator(q, k, v, mask, attn_bias, scale, *options)

    return kernel


for _device_type in ("cpu", "cuda"):
    for _name in ("forward", "partials"):
        _kernel = _autocast(getattr(_ops, _name), _device_type)
        _library.impl(_name, _kernel, f"Autocast{_device_type.upper()}")


# FLOPs, from shapes alone: a multiply-add is two; causal counts the visible pairs only, a key mask is data.


def _matmul_flops(q, k, causal: bool) -> int:
    """FLOPs of one product of seq_len_q x seq_len_k x head_dim over all heads."""
    batch, num_heads, seq_len_q, head_dim = q
    seq_len_k = k[2]
    pairs = seq_len_q * seq_len_k
    if causal:
        num_rows = min(seq_len_q, seq_len_k)  # that see a key: the last sees all, each one before one less
        pairs = num_rows * seq_len_k - num_rows * (num_rows - 1) // 2
    return 2 * batch * num_heads * pairs * head_dim


@register_flop_formula([_ops.forward, _ops.partials])
def _forward_flops(q, k, v, mask, attn_bias, scale, groups, causal, l2norm_qk, out_shape=None) -> int:  # noqa: ARG001
    return 2 * _matmul_flops(q, k, causal)  # q k^T, P v


@register_flop_formula(_ops.backward)
def _backward_flops(do, q, k, *rest, out_shape=None) -> int:  # noqa: ARG001
    causal = rest[-4]
    return 5 * _matmul_flops(q, k, causal)  # q k^T again, dO v^T, P^T dO, dS k, dS^T q


load_kernels()
