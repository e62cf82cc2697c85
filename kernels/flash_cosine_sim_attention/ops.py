"""The operators torch.ops.flash_cosine_sim_attention.{forward, partials, backward}.

Autograd, autocast, fake tensors and FLOP formulas live here and need no build; what the operators' arguments are, and
in which order, is call.py's. On the CPU the closed forms of reference.py serve; on CUDA the kernels of csrc/, which a
compiled library `_C*.so` in this directory registers for the same schemas when it is loaded. The schemas are the seam
to that library: it is built against them, and a library built for other ones must be built again.

    o, do, numerator             (batch, num_heads, seq_len_q, head_dim)
    row_sum_log2, denominator    float32 (batch, num_heads, seq_len_q)

The operators do not validate: interface.py did. What an implementation may rely on, and what it must keep to:

- Any strides, 0 included, are possible in mask, attn_bias and do. `kernel_attention` makes the last dimension
  of q, k and v contiguous; their other strides are arbitrary. Everything else that comes in is contiguous, but
  for o, which is as below.
- o has the strides of empty_like(q), and every gradient those of empty_like of its tensor: (batch, seq_len,
  heads, head_dim) storage viewed as (batch, heads, ...) stays such. The other outputs are contiguous.
- cu_seqlens_q and cu_seqlens_k are contiguous and int32, and have no gradient. On a GPU nobody has read them: whatever
  they hold, an implementation neither reads nor writes outside the tensors.
- causal is True exactly where window_right is 0; a window with a side that hides nothing may come in.
- A row without a visible key has row_sum_log2 = -inf, o = 0 and no share in any gradient.
- row_sum_log2 is log2 of the row sum, not shifted. In the backward pass it is whatever makes P = exp(S) *
  2^-row_sum_log2 belong to do: the gradient of float16 partials passes do * 2^-e with row_sum_log2 - e, and
  there P may exceed 1.
- A gradient, or a row_sum_log2, that is not needed has the shape (0,). dscale = sum(dS * cos), never a sum
  divided by scale, which may be 0.
- allow_tf32 permits TF32 products of float32 inputs. Forward and backward get the same.
"""

import ctypes
import logging
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from .call import (
    BACKWARD,
    DIFFERENTIABLE,
    FORWARD,
    IN_DTYPE_OF_Q,
    NEEDS,
    PARTIALS,
    SCHEMAS,
    SHARED,
    TENSORS,
    VALUES,
    Call,
    Operator,
    picker,
)
from .reference import (
    LOG2_E,
    compute_dtype,
    has_values,
    reference_backward,
    reference_forward,
    reference_partials,
)

Function = TypeVar("Function")

NAMESPACE = "flash_cosine_sim_attention"

_library = torch.library.Library(NAMESPACE, "DEF")
for _operator in (FORWARD, PARTIALS, BACKWARD):
    _library.define(_operator.schema)
# Resolved once: looking an overload up costs a microsecond per call.
_forward, _partials, _backward = (
    getattr(torch.ops.flash_cosine_sim_attention, operator.name).default for operator in (FORWARD, PARTIALS, BACKWARD)
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
    # Without the question, a library that loads has kernels.
    has_kernel = getattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *_: True)
    names = [operator.name for operator in (FORWARD, PARTIALS, BACKWARD)]
    missing = [name for name in names if not has_kernel(f"{NAMESPACE}::{name}", "CUDA")]
    if _schemas_of(libraries[0]) not in (SCHEMAS, None):
        _kernels_error = f"{libraries[0].name} was built for another version, whose operators differ; build it again"
    elif missing:
        _kernels_error = f"{libraries[0].name} loads, but has no CUDA kernel for {', '.join(missing)}; build it again"
    else:
        _kernels_error = None


def _schemas_of(library: Path) -> str | None:
    """The schemas that a loaded library was built for; None where it does not say, as those of before 1.0."""
    try:
        stored = ctypes.c_char.in_dll(ctypes.CDLL(str(library)), "flash_cosine_sim_schemas")
    except (OSError, ValueError):
        return None
    return ctypes.string_at(ctypes.addressof(stored)).decode()


def kernels_available() -> bool:
    """Whether the compiled CUDA kernels are loaded and registered. It asks no device."""
    return _kernels_error is None


def kernels_error() -> str | None:
    """Why the compiled CUDA kernels cannot serve; None where they can."""
    return _kernels_error


def constant_when_compiled(function: Function) -> Function:
    """torch.compiler.assume_constant_result, which would import torch._dynamo: that takes seconds."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_when_compiled
def _tf32_allowed() -> bool:
    """Whether float32 products may be rounded to TF32, by PyTorch's own setting.

    torch.backends.cuda.matmul.allow_tf32 and torch.set_float32_matmul_precision set it too, but reading
    allow_tf32 raises once fp32_precision has been set. torch.compile guards this setting.
    """
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


def kernel_attention(call: tuple[Any, ...], return_partials: bool) -> Tensor | tuple[Tensor, Tensor]:
    """Attention by the operators, of the values of a Call."""
    q, k, v, *rest = call
    q = q if q.stride(-1) == 1 else q.contiguous()
    k = k if k.stride(-1) == 1 else k.contiguous()
    v = v if v.stride(-1) == 1 else v.contiguous()
    # Read here alone; the backward pass gets it from the autograd graph.
    allow_tf32 = q.dtype == torch.float32 and _tf32_allowed()
    if return_partials:
        return _call_partials(q, k, v, *rest, allow_tf32)
    # No row sums: where there are gradients, autograd asks for them.
    return _call_forward(q, k, v, *rest, allow_tf32, False)[0]


# The CPU implementations. allow_tf32 and deterministic change nothing: there is no TF32 on the CPU, and the
# reference is deterministic.


def _forward_cpu(*arguments):
    o, row_sum_log2 = reference_forward(FORWARD.call(arguments))
    return o, row_sum_log2 if FORWARD.decode(arguments).need_row_sum_log2 else row_sum_log2.new_empty(0)


def _partials_cpu(*arguments):
    return reference_partials(PARTIALS.call(arguments))


def _backward_cpu(*arguments):
    given = BACKWARD.decode(arguments)
    rows = given.o, given.row_sum_log2, given.drow_sum_log2
    return reference_backward(given.do, BACKWARD.call(arguments), *rows, _needs_of_backward(arguments))


_differentiable_of_backward = picker(BACKWARD.fields, DIFFERENTIABLE)
_needs_of_backward = picker(BACKWARD.fields, NEEDS)

_library.impl("forward", _forward_cpu, "CPU")
_library.impl("partials", _partials_cpu, "CPU")
_library.impl("backward", _backward_cpu, "CPU")


# Fake tensors: shapes, dtypes and strides without data, for torch.compile, torch.export and the meta device.


@torch.library.register_fake(f"{NAMESPACE}::forward", lib=_library)
def _forward_fake(*arguments):
    given = FORWARD.decode(arguments)
    q, rows = given.q, given.q.shape[:-1] if given.need_row_sum_log2 else 0
    return torch.empty_like(q), q.new_empty(rows, dtype=compute_dtype(q.dtype))


@torch.library.register_fake(f"{NAMESPACE}::partials", lib=_library)
def _partials_fake(*arguments):
    q = PARTIALS.decode(arguments).q
    dtype = compute_dtype(q.dtype)
    return q.new_empty(q.shape, dtype=dtype), q.new_empty(q.shape[:-1], dtype=dtype)


@torch.library.register_fake(f"{NAMESPACE}::backward", lib=_library)
def _backward_fake(*arguments):
    tensors = _differentiable_of_backward(arguments)
    q, *_ = tensors
    needed = zip(DIFFERENTIABLE, tensors, _needs_of_backward(arguments), strict=True)
    return tuple(
        torch.empty_like(tensor)
        if need
        else q.new_empty(0, dtype=q.dtype if name in IN_DTYPE_OF_Q else compute_dtype(q.dtype))
        for name, tensor, need in needed
    )


# Autograd: only the inputs, the output and one number per row are saved.


def _forward_autograd(ctx, do, drow_sum_log2):
    *tensors, o, row_sum_log2 = ctx.saved_tensors  # read once: activation checkpointing allows no more
    do = torch.zeros_like(o) if do is None else do
    return _input_grads(ctx, tensors, do, o, row_sum_log2, drow_sum_log2)


def _partials_autograd(ctx, dnumerator, ddenominator):
    """With numerator = o * 2^L and denominator = 2^L, L = row_sum_log2, the chain rule leads to o and L.

    do = denominator * dnumerator is the well-scaled choice: dnumerator carries one over the total row sum.
    """
    *tensors, numerator, denominator = ctx.saved_tensors
    dnumerator = torch.zeros_like(numerator) if dnumerator is None else dnumerator
    ddenominator = torch.zeros_like(denominator) if ddenominator is None else ddenominator
    q, *_ = tensors
    dtype, wide = q.dtype, numerator.dtype
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
    return _input_grads(ctx, tensors, low_do, low_o, row_sum_log2, drow / LOG2_E)


def _input_grads(ctx, tensors, do, o, row_sum_log2, drow_sum_log2):
    """Gradients of all arguments, given those of o and of row_sum_log2."""
    needs = _pick_differentiable(ctx.needs_input_grad)
    deterministic = torch.are_deterministic_algorithms_enabled()
    known = *tensors, *ctx.values, do, o, row_sum_log2, drow_sum_log2, *needs, deterministic
    grads = _call_backward(*_as_arguments_of_backward(known))
    grads = (grad if needed else None for grad, needed in zip(grads, needs, strict=True))
    return _as_input_grads((*grads, None))


_pick_differentiable = picker(tuple(SHARED), DIFFERENTIABLE)
_as_arguments_of_backward = picker(
    (*TENSORS, *VALUES, "do", "o", "row_sum_log2", "drow_sum_log2", *NEEDS, "deterministic"), BACKWARD.fields
)
_as_input_grads = picker((*DIFFERENTIABLE, "none"), [name if name in DIFFERENTIABLE else "none" for name in SHARED])


def _double_backward(_ctx, *_grads):
    raise RuntimeError(
        "flash_cosine_sim_attention's operators have no double backward; use backend='reference' (or "
        "plain_cosine_sim_attention), which is plain PyTorch, where gradients of gradients are needed"
    )


def _eager_keys() -> int | None:
    """What a thread dispatches to by default: no transform of torch.func, no tracer and no mode comes before autograd.

    None if a name that is needed for it, or by `_register_autograd`, is not there: they are PyTorch's own, and may be
    renamed in any release.
    """
    try:
        key, _ = torch._C.DispatchKey, forward_ad._current_level
        keys = torch._C.DispatchKeySet(key.BackendSelect).add(key.ADInplaceOrView).raw_repr()
        torch._C._dispatch_tls_local_include_set().raw_repr()
        torch._C._any_requires_grad()
        torch._C._functorch.is_functorch_wrapped_tensor(torch.empty(0))
        super(torch.autograd.Function, torch.autograd.Function).apply  # noqa: B018
        with torch._C._AutoDispatchBelowAutograd():
            return int(keys)
    except (AttributeError, TypeError) as error:
        logging.getLogger(NAMESPACE).warning(
            "torch %s has not all private names that make calls fast (%s): public ones are used, which take the host "
            "longer",
            torch.__version__,
            error,
        )
        return None


_EAGER_KEYS = _eager_keys()
_NO_FORWARD_MODE = (
    "flash_cosine_sim_attention's operators have no forward-mode derivative; use backend='reference' (or "
    "plain_cosine_sim_attention), which is plain PyTorch"
)


def _register_autograd(overload, operator: Operator, backward, saves: bool = True):
    """Registers `backward`, and returns a function that calls the operator; of `saves` below."""
    register = _register_autograd_publicly if _EAGER_KEYS is None else _register_autograd_fast
    return register(overload, operator, backward, saves)


def _register_autograd_publicly(overload, operator: Operator, backward, saves: bool):
    """By public names alone."""
    required = picker(operator.fields, operator.required)
    tensors, values = picker(operator.fields, TENSORS), picker(operator.fields, VALUES)

    def setup_context(ctx, inputs, output):
        if saves:
            ctx.save_for_backward(*tensors(inputs), *output)
            ctx.values = values(inputs)
        ctx.set_materialize_grads(False)

    torch.library.register_autograd(
        f"{NAMESPACE}::{operator.name}", backward, setup_context=setup_context, lib=_library
    )

    def call(*arguments):
        given = [argument for argument in arguments if isinstance(argument, Tensor)]
        if not torch.compiler.is_compiling() and any(map(_has_tangent, given)):
            raise NotImplementedError(_NO_FORWARD_MODE)
        differentiable = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)
        return overload(*(required(arguments) if differentiable else arguments))

    return call


def _register_autograd_fast(overload, operator: Operator, backward, saves: bool):
    """Like torch.library.register_autograd, at less than half of its host time per call.

    With `saves`, TENSORS and the results are saved as tensors, VALUES as ctx.values. Where there are gradients,
    arguments that have a default have that. Dual tensors are refused: a kernel below autograd would silently lose
    their tangents.

    Returns a function that calls the operator. In eager mode the dispatcher would only find the kernel registered
    here, which takes it longer than the kernel does; so that is called straight away.
    """
    required = picker(operator.fields, operator.required)
    tensors, values = picker(operator.fields, TENSORS), picker(operator.fields, VALUES)
    pick_qkv = picker(operator.fields, ("q", "k", "v"))
    is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    below = getattr(overload, "_op", overload)  # past a Python function that does nothing else

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *arguments):
            with torch._C._AutoDispatchBelowAutograd():
                output = below(*arguments)
            if saves:
                ctx.save_for_backward(*tensors(arguments), *output)  # mask, attn_bias, scale may be None
                ctx.values = values(arguments)
            ctx.set_materialize_grads(False)
            return output

        @staticmethod
        def backward(ctx, *grads):
            return backward(ctx, *grads)

    # Function.apply, where no transform is active, does this and looks at each argument first: see `call`.
    apply_in_eager_mode = super(torch.autograd.Function, Differentiable).apply

    def attend(arguments, apply):
        if forward_ad._current_level >= 0 and any(map(_has_tangent, arguments)):
            raise NotImplementedError(_NO_FORWARD_MODE)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            try:
                return apply(*required(arguments))
            except RuntimeError as error:
                if "functorch transforms" not in str(error):
                    raise
                raise NotImplementedError(
                    "flash_cosine_sim_attention's operators have no gradient under torch.func's grad, vjp, jacrev and "
                    "hessian (torch.autograd's and torch.vmap they have); use backend='sdpa', or 'reference', which "
                    "has every derivative"
                ) from error
        with torch._C._AutoDispatchBelowAutograd():
            return below(*arguments)

    def kernel(*arguments):
        return attend(arguments, Differentiable.apply)

    _library.impl(operator.name, kernel, "Autograd")

    def call(*arguments):
        if torch.compiler.is_compiling():  # before anything that it cannot trace
            return overload(*arguments)
        q, k, v = pick_qkv(arguments)
        eager = (
            torch._C._dispatch_tls_local_include_set().raw_repr() == _EAGER_KEYS
            and type(q) is type(k) is type(v) is Tensor  # a subclass may dispatch itself
            and not (is_wrapped(q) or is_wrapped(k) or is_wrapped(v))  # what a transform left behind
        )
        return attend(arguments, apply_in_eager_mode) if eager else overload(*arguments)

    return call


def _has_tangent(argument) -> bool:
    return isinstance(argument, Tensor) and forward_ad.unpack_dual(argument).tangent is not None


_call_forward = _register_autograd(_forward, FORWARD, _forward_autograd)
_call_partials = _register_autograd(_partials, PARTIALS, _partials_autograd)
_call_backward = _register_autograd(_backward, BACKWARD, _double_backward, saves=False)


# Autocast: torch.library.register_autocast would cast every tensor, but a learned scale stays float32.


def _autocast(overload, operator: Operator, device_type: str):
    is_cast = [name in IN_DTYPE_OF_Q for name in operator.fields]

    def cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        return tensor if tensor is None or tensor.dtype == torch.float64 else tensor.to(dtype)

    def kernel(*arguments):
        dtype = torch.get_autocast_dtype(device_type)
        with torch.autocast(device_type, enabled=False):
            # Not strict: an argument at its default may be left out.
            return overload(*(cast(a, dtype) if casts else a for a, casts in zip(arguments, is_cast, strict=False)))

    return kernel


for _device_type in ("cpu", "cuda"):
    for _overload, _operator in ((_forward, FORWARD), (_partials, PARTIALS)):
        _kernel = _autocast(_overload, _operator, _device_type)
        _library.impl(_operator.name, _kernel, f"Autocast{_device_type.upper()}")


# FLOPs: a multiply-add is two, and only pairs inside the window and the sequence count. A key mask is data.


def visible_pairs(seq_len_q: int, seq_len_k: int, window_left: int, window_right: int) -> int:
    """The number of pairs of a query and a key inside the window (left, right) of a Call."""

    def within(distance: int) -> int:
        """Pairs of query i and key j with i + seq_len_k - seq_len_q - j <= distance.

        With j' = seq_len_k - 1 - j, those are the pairs with i + j' < distance + seq_len_q: a triangle, without its
        parts beyond either length; what is beyond both has been taken off twice.
        """
        side = distance + seq_len_q
        beyond = _triangle(side - seq_len_q) + _triangle(side - seq_len_k) - _triangle(side - seq_len_q - seq_len_k)
        return _triangle(side) - beyond

    left = seq_len_k if window_left < 0 else window_left
    right = seq_len_q if window_right < 0 else window_right
    return within(left) - within(-right - 1)


def _triangle(side: int) -> int:
    """The number of pairs of integers a, b >= 0 with a + b < side."""
    side = max(0, side)
    return side * (side + 1) // 2


def _pairs(call: Call) -> int:
    """Pairs of one head, over the batch; of packed sequences whose lengths are not known (fake tensors) a bound.

    The bound is what one sequence of all rows would have: on each diagonal, that has no fewer pairs.
    """
    window = call.window_left, call.window_right
    if call.cu_seqlens_q is None or not (has_values(call.cu_seqlens_q) and has_values(call.cu_seqlens_k)):
        return call.q.shape[0] * visible_pairs(call.q.shape[2], call.k.shape[2], *window)
    lengths = zip(call.cu_seqlens_q.diff().tolist(), call.cu_seqlens_k.diff().tolist(), strict=True)
    return sum(visible_pairs(*pair, *window) for pair in lengths)


def _matmul_flops(call: Call) -> int:
    """FLOPs of one product of every visible pair over head_dim, over all heads."""
    _, num_heads, _, head_dim = call.q.shape
    return 2 * num_heads * _pairs(call) * head_dim


def _register_forward_flops(operator: Operator) -> None:
    @register_flop_formula(getattr(torch.ops.flash_cosine_sim_attention, operator.name), get_raw=True)
    def flops(*arguments, out_val=None) -> int:  # noqa: ARG001
        return 2 * _matmul_flops(operator.call(arguments))  # q k^T, P v


_register_forward_flops(FORWARD)
_register_forward_flops(PARTIALS)


@register_flop_formula(torch.ops.flash_cosine_sim_attention.backward, get_raw=True)
def _backward_flops(*arguments, out_val=None) -> int:  # noqa: ARG001
    given = BACKWARD.decode(arguments)
    # q k^T again, dO v^T; dS k, dS^T q, P^T dO
    need_ds = any(getattr(given, need) for need in NEEDS if need != "need_dv")
    num_products = 1 + need_ds + given.need_dq + given.need_dk + given.need_dv
    return num_products * _matmul_flops(BACKWARD.call(arguments))


load_kernels()
