"""The operators torch.ops.flash_cosine_sim_attention.{forward, partials, backward}.

Schemas, autograd, autocast, fake tensors and FLOP formulas live here and need no build. On the CPU the closed
forms of reference.py serve; on CUDA the kernels of csrc/, which a compiled library `_C*.so` in this directory
registers for the same schemas when it is loaded. The schemas are the seam to that library: it is built
against them, and a library built for other ones must be built again.

    q, o, do, numerator          (batch, num_heads, seq_len_q, head_dim)
    k, v                         (batch, num_kv_heads, seq_len_k, head_dim)
    mask                         bool (batch, seq_len_k)
    attn_bias                    in q's dtype, broadcastable to (batch, num_heads, seq_len_q, seq_len_k)
    scale                        float32 (1,) or (num_heads,); None: it is scale_value, else that is ignored
    row_sum_log2, denominator    float32 (batch, num_heads, seq_len_q)

The operators do not validate: interface.py did. What an implementation may rely on, and what it must keep to:

- Any strides, 0 included, are possible in mask, attn_bias and do. `kernel_attention` makes the last dimension
  of q, k and v contiguous; their other strides are arbitrary. Everything else that comes in is contiguous, but
  for o, which is as below.
- o has the strides of empty_like(q), and every gradient those of empty_like of its tensor: (batch, seq_len,
  heads, head_dim) storage viewed as (batch, heads, ...) stays such. The other outputs are contiguous.
- A row without a visible key has row_sum_log2 = -inf, o = 0 and no share in any gradient.
- row_sum_log2 is log2 of the row sum, not shifted. In the backward pass it is whatever makes P = exp(S) *
  2^-row_sum_log2 belong to do: the gradient of float16 partials passes do * 2^-e with row_sum_log2 - e, and
  there P may exceed 1.
- A gradient, or a row_sum_log2, that is not needed has the shape (0,). dscale = sum(dS * cos), never a sum
  divided by scale, which may be 0.
- allow_tf32 permits TF32 products of float32 inputs. Forward and backward get the same.
"""

from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from .reference import LOG2_E, compute_dtype, reference_backward, reference_forward, reference_partials

NAMESPACE = "flash_cosine_sim_attention"
_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? attn_bias, Tensor? scale, float scale_value"
_OPTIONS = "int groups, bool causal, bool l2norm_qk, bool allow_tf32"
_NEEDS = "bool need_dq, bool need_dk, bool need_dv, bool need_dattn_bias, bool need_dscale"

_library = torch.library.Library(NAMESPACE, "DEF")
# Without gradients nobody needs the row sums: they cost the kernels an addition a score.
_library.define(f"forward({_INPUTS}, {_OPTIONS}, bool need_row_sum_log2=True) -> (Tensor o, Tensor row_sum_log2)")
_library.define(f"partials({_INPUTS}, {_OPTIONS}) -> (Tensor numerator, Tensor denominator)")
# drow_sum_log2 joins the row statistic delta = rowsum(do * o) - log2(e) * drow_sum_log2; None is zero.
_library.define(
    f"backward(Tensor do, {_INPUTS}, Tensor o, Tensor row_sum_log2, Tensor? drow_sum_log2, {_OPTIONS}, {_NEEDS}, "
    "bool deterministic) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dattn_bias, Tensor dscale)"
)
_NUM_SHARED = 11  # of arguments that forward and partials have in common
# Resolved once: looking an overload up costs a microsecond per call.
_forward, _partials, _backward = (
    getattr(torch.ops.flash_cosine_sim_attention, name).default for name in ("forward", "partials", "backward")
)

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
        return
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    names = ("forward", "partials", "backward")
    missing = [name for name in names if not has_kernel(f"{NAMESPACE}::{name}", "CUDA")]
    if missing:
        _kernels_error = f"{libraries[0].name} loads, but has no CUDA kernel for {', '.join(missing)}; build it again"
    else:
        _kernels_error = None


def kernels_available() -> bool:
    """Whether the compiled CUDA kernels are loaded and registered. It asks no device."""
    return _kernels_error is None


def kernels_error() -> str | None:
    """Why the compiled CUDA kernels cannot serve; None where they can."""
    return _kernels_error


def constant_when_compiled(function):
    """torch.compiler.assume_constant_result, which would import torch._dynamo: that takes seconds."""
    function._dynamo_marked_constant = True
    return function


@constant_when_compiled
def _tf32_allowed() -> bool:
    """Whether float32 products may be rounded to TF32, by PyTorch's own setting.

    torch.backends.cuda.matmul.allow_tf32 and torch.set_float32_matmul_precision set it too, but reading
    allow_tf32 raises once fp32_precision has been set. torch.compile guards this setting.
    """
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


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
    q = q if q.stride(-1) == 1 else q.contiguous()
    k = k if k.stride(-1) == 1 else k.contiguous()
    v = v if v.stride(-1) == 1 else v.contiguous()
    # A number stays one: no tensor is made for it, and no gradient.
    scale, scale_value = (scale, 1.0) if isinstance(scale, Tensor) else (None, scale)
    # Read here alone; the backward pass gets it from the autograd graph.
    allow_tf32 = q.dtype == torch.float32 and _tf32_allowed()
    arguments = q, k, v, mask, attn_bias, scale, scale_value, groups, causal, l2norm_qk, allow_tf32
    if return_partials:
        return _call_partials(*arguments)
    return _call_forward(*arguments, False)[0]  # where there are gradients, autograd asks for the row sums


# The CPU implementations. allow_tf32 and deterministic change nothing: there is no TF32 on the CPU, and the
# reference is deterministic.


def _forward_cpu(q, k, v, mask, attn_bias, scale, scale_value, groups, causal, l2norm_qk, _allow_tf32, need_sums=True):
    scale = scale_value if scale is None else scale
    o, row_sum_log2 = reference_forward(q, k, v, mask, attn_bias, scale, groups, causal, l2norm_qk)
    return o, row_sum_log2 if need_sums else row_sum_log2.new_empty(0)


def _partials_cpu(q, k, v, mask, attn_bias, scale, scale_value, groups, causal, l2norm_qk, _allow_tf32):
    scale = scale_value if scale is None else scale
    return reference_partials(q, k, v, mask, attn_bias, scale, groups, causal, l2norm_qk)


def _backward_cpu(do, q, k, v, mask, attn_bias, scale, scale_value, o, row_sum_log2, drow_sum_log2, *options):
    groups, causal, l2norm_qk, _allow_tf32, *needs, _deterministic = options
    scale = scale_value if scale is None else scale
    rows = o, row_sum_log2, drow_sum_log2
    return reference_backward(do, q, k, v, mask, attn_bias, scale, *rows, groups, causal, l2norm_qk, needs)


_library.impl("forward", _forward_cpu, "CPU")
_library.impl("partials", _partials_cpu, "CPU")
_library.impl("backward", _backward_cpu, "CPU")


# Fake tensors: shapes, dtypes and strides without data, for torch.compile, torch.export and the meta device.


@torch.library.register_fake(f"{NAMESPACE}::forward", lib=_library)
def _forward_fake(q, *inputs):
    need_row_sum_log2 = len(inputs) < _NUM_SHARED or inputs[-1]  # an argument at its default may be left out
    return torch.empty_like(q), q.new_empty(q.shape[:-1] if need_row_sum_log2 else 0, dtype=compute_dtype(q.dtype))


@torch.library.register_fake(f"{NAMESPACE}::partials", lib=_library)
def _partials_fake(q, *_inputs):
    dtype = compute_dtype(q.dtype)
    return q.new_empty(q.shape, dtype=dtype), q.new_empty(q.shape[:-1], dtype=dtype)


@torch.library.register_fake(f"{NAMESPACE}::backward", lib=_library)
def _backward_fake(_do, q, k, v, _mask, attn_bias, scale, *options):
    needs = options[-6:-1]
    dtypes = (q.dtype, q.dtype, q.dtype, q.dtype, compute_dtype(q.dtype))
    return tuple(
        torch.empty_like(tensor) if needed else q.new_empty(0, dtype=dtype)
        for tensor, needed, dtype in zip((q, k, v, attn_bias, scale), needs, dtypes, strict=True)
    )


# Autograd: only the inputs, the output and one number per row are saved.


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
    dtype, wide = inputs[0].dtype, numerator.dtype
    o = numerator / denominator.masked_fill(denominator == 0, 1).unsqueeze(-1)
    do = dnumerator * denominator.unsqueeze(-1)
    row_sum_log2 = denominator.log2()
    # log2(e) * drow_sum_log2, so far
    drow = (numerator * dnumerator).sum(-1) + denominator * ddenominator
    if dtype == torch.float16:
        # A row of do beyond float16's range is divided by a power of two, which its P = exp(S) * 2^-L regains.
        exponent = (do.abs().amax(-1) * 2.0**-14).log2().ceil().clamp(min=0)
        factor = torch.exp2(-exponent)
        do, drow, row_sum_log2 = do * factor.unsqueeze(-1), drow * factor, row_sum_log2 - exponent
    low_do, low_o = do.to(dtype), o.to(dtype)
    # The operator takes rowsum(low_do * low_o) off dP = low_do V^T. Correcting it to rowsum(low_do * o) leaves
    # (low_do - do) (v - o)^T as the error of rounding do: small where the row is all but one-hot.
    drow = drow + (low_do.to(wide) * (low_o.to(wide) - o)).sum(-1)
    return _input_grads(ctx, inputs, low_do, low_o, row_sum_log2, drow / LOG2_E)


def _input_grads(ctx, inputs, do, o, row_sum_log2, drow_sum_log2):
    """Gradients of all arguments, given those of o and of row_sum_log2."""
    need_dq, need_dk, need_dv, _, need_dattn_bias, need_dscale = ctx.needs_input_grad[:6]
    needs = need_dq, need_dk, need_dv, need_dattn_bias, need_dscale
    scale_value, *options = ctx.options
    rows = o, row_sum_log2, drow_sum_log2
    deterministic = torch.are_deterministic_algorithms_enabled()
    grads = _call_backward(do, *inputs, scale_value, *rows, *options, *needs, deterministic)
    dq, dk, dv, dattn_bias, dscale = (grad if needed else None for grad, needed in zip(grads, needs, strict=True))
    return dq, dk, dv, None, dattn_bias, dscale, *[None] * len(ctx.options)


def _double_backward(_ctx, *_grads):
    raise RuntimeError(
        "flash_cosine_sim_attention's operators have no double backward; use backend='reference' (or "
        "plain_cosine_sim_attention), which is plain PyTorch, where gradients of gradients are needed"
    )


# What a thread dispatches to by default: no transform of torch.func, no tracer and no mode comes before autograd.
_EAGER_KEYS = (
    torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect).add(torch._C.DispatchKey.ADInplaceOrView).raw_repr()
)


def _register_autograd(operator, backward, num_saved_inputs: int, num_inputs: int | None):
    """Like torch.library.register_autograd, at less than half of its host time per call.

    The first `num_saved_inputs` arguments and all outputs are saved as tensors, the other arguments as
    ctx.options. Where there are gradients, arguments after the first `num_inputs` have their defaults.
    Dual tensors are refused: a kernel below autograd would silently lose their tangents.

    Returns a function that calls the operator. In eager mode the dispatcher would only find the kernel registered
    here, which takes it longer than the kernel does; so that is called straight away.
    """

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            with torch._C._AutoDispatchBelowAutograd():
                output = operator(*inputs)
            if num_saved_inputs > 0:
                ctx.save_for_backward(*inputs[:num_saved_inputs], *output)  # mask, attn_bias, scale may be None
                ctx.options = inputs[num_saved_inputs:]
            ctx.set_materialize_grads(False)
            return output

        @staticmethod
        def backward(ctx, *grads):
            return backward(ctx, *grads)

    def kernel(*inputs):
        if forward_ad._current_level >= 0 and any(map(_has_tangent, inputs)):
            raise NotImplementedError(
                "flash_cosine_sim_attention's operators have no forward-mode derivative; use backend='reference' "
                "(or plain_cosine_sim_attention), which is plain PyTorch"
            )
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
            try:
                return Differentiable.apply(*inputs[:num_inputs])
            except RuntimeError as error:
                if "functorch transforms" not in str(error):
                    raise
                raise NotImplementedError(
                    "flash_cosine_sim_attention's operators have no gradient under torch.func's grad, vjp, jacrev and "
                    "hessian (torch.autograd's and torch.vmap they have); use backend='sdpa', or 'reference', which "
                    "has every derivative"
                ) from error
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*inputs)

    _library.impl(operator._opname, kernel, "Autograd")

    def call(*inputs):
        eager = (
            not torch.compiler.is_compiling()
            and torch._C._dispatch_tls_local_include_set().raw_repr() == _EAGER_KEYS
            and type(inputs[0]) is type(inputs[1]) is type(inputs[2]) is Tensor  # a subclass may dispatch itself
        )
        return kernel(*inputs) if eager else operator(*inputs)

    return call


def _has_tangent(argument) -> bool:
    return isinstance(argument, Tensor) and forward_ad.unpack_dual(argument).tangent is not None


_call_forward = _register_autograd(_forward, _forward_autograd, num_saved_inputs=6, num_inputs=_NUM_SHARED)
_call_partials = _register_autograd(_partials, _partials_autograd, num_saved_inputs=6, num_inputs=_NUM_SHARED)
_call_backward = _register_autograd(_backward, _double_backward, num_saved_inputs=0, num_inputs=None)


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
    for _operator in (_forward, _partials):
        _library.impl(_operator._opname, _autocast(_operator, _device_type), f"Autocast{_device_type.upper()}")


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


@register_flop_formula([torch.ops.flash_cosine_sim_attention.forward, torch.ops.flash_cosine_sim_attention.partials])
def _forward_flops(q, k, v, mask, attn_bias, scale, scale_value, groups, causal, *options, out_shape=None) -> int:  # noqa: ARG001
    return 2 * _matmul_flops(q, k, causal)  # q k^T, P v


@register_flop_formula(torch.ops.flash_cosine_sim_attention.backward)
def _backward_flops(do, q, k, *rest, out_shape=None) -> int:  # noqa: ARG001
    *_, causal, _l2norm_qk, _allow_tf32, dq, dk, dv, dattn_bias, dscale, _deterministic = rest
    # q k^T again, dO v^T; dS k, dS^T q, P^T dO
    num_products = 1 + (dq or dk or dattn_bias or dscale) + dq + dk + dv
    return num_products * _matmul_flops(q, k, causal)


load_kernels()
