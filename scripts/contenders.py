"""What scripts.benchmark compares: the problem, its inputs, and every attention that can solve it."""

import importlib
import math
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import distributions
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flash_cosine_sim_attention import flash_cosine_sim_attention, plain_cosine_sim_attention

SCALE = 10.0
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# name: module that has flash_attn_func, distribution
FLASH_ATTENTION = {
    "FlashAttention-4": ("flash_attn.cute", "flash-attn-4"),
    "FlashAttention-3": ("flash_attn_interface", "flash-attn-3"),
}
PREDECESSOR = "flash_cosine_sim_attention"  # 0.1 and 0.2 on PyPI: a module of the same name as ours
INSTALL_PREDECESSOR = "pip install --no-deps --no-build-isolation --target PATH flash-cosine-sim-attention==0.2.2"


@dataclass(frozen=True)
class Case:
    """One problem: shapes and options."""

    batch: int
    heads: int
    kv_heads: int
    seq_len: int
    head_dim: int
    dtype: str
    causal: bool
    mask_prob: float
    bias: bool
    seq_len_q: int | None = None  # seq_len, unless queries are fewer than keys

    @property
    def queries(self) -> int:
        return self.seq_len_q or self.seq_len

    def flops(self) -> float:
        """Forward operations of the two matrix products, a causal row counting the keys it sees."""
        pairs = self.seq_len * (self.seq_len + 1) / 2 if self.causal else self.queries * self.seq_len
        return 4 * self.batch * self.heads * pairs * self.head_dim


@dataclass
class Inputs:
    """q (batch, heads, i, head_dim); k, v (batch, kv_heads, j, head_dim); mask (batch, j); bias (heads, i, j); do."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    bias: Tensor | None
    do: Tensor

    def leaves(self) -> list[Tensor]:
        """What gradients are taken of."""
        return [tensor for tensor in (self.q, self.k, self.v, self.bias) if tensor is not None]

    def detached(self) -> "Inputs":
        """The same tensors, of which no gradient can be taken."""
        bias = None if self.bias is None else self.bias.detach()
        return Inputs(self.q.detach(), self.k.detach(), self.v.detach(), self.mask, bias, self.do)

    def leaf(self) -> "Inputs":
        """The same tensors as leaves, of which gradients can be taken."""
        bias = None if self.bias is None else self.bias.detach().requires_grad_()
        q, k, v = (tensor.detach().requires_grad_() for tensor in (self.q, self.k, self.v))
        return Inputs(q, k, v, self.mask, bias, self.do)

    def double(self) -> "Inputs":
        """The same numbers in float64, for what is exact."""
        q, k, v, do = (tensor.detach().double() for tensor in (self.q, self.k, self.v, self.do))
        bias = None if self.bias is None else self.bias.detach().double().requires_grad_()
        return Inputs(*(tensor.requires_grad_() for tensor in (q, k, v)), self.mask, bias, do)


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """Random inputs of a case; every batch element keeps its first key."""
    dtype, generator = DTYPES[case.dtype], torch.Generator(device).manual_seed(0)
    random = partial(torch.randn, device=device, dtype=dtype, generator=generator)
    shape = (case.batch, case.heads, case.queries, case.head_dim)
    kv_shape = (case.batch, case.kv_heads, case.seq_len, case.head_dim)
    q, k, v = (random(size).requires_grad_() for size in (shape, kv_shape, kv_shape))
    mask = bias = None
    if case.mask_prob:
        mask = torch.rand(case.batch, case.seq_len, device=device, generator=generator) >= case.mask_prob
        mask[:, 0] = True
    if case.bias:
        bias = random((case.heads, case.queries, case.seq_len)).requires_grad_()
    return Inputs(q, k, v, mask, bias, random(shape))


def exact(inputs: Inputs, case: Case, cosine: bool) -> list[Tensor]:
    """Output and gradients in float64."""
    wide = inputs.double()
    if cosine:
        o = plain_cosine_sim_attention(wide.q, wide.k, wide.v, wide.mask, wide.bias, SCALE, causal=case.causal)
    else:
        with sdpa_kernel(SDPBackend.MATH):
            o = sdpa(wide, case, normalise=False)
    return [o.detach(), *torch.autograd.grad(o, wide.leaves(), wide.do)]


def ours(inputs: Inputs, case: Case, backend: str) -> Tensor:
    """flash_cosine_sim_attention."""
    return flash_cosine_sim_attention(
        inputs.q, inputs.k, inputs.v, inputs.mask, inputs.bias, SCALE, causal=case.causal, backend=backend
    )


def naive(inputs: Inputs, case: Case) -> Tensor:
    """Normalise, multiply, mask, softmax, multiply: every score in memory, as one writes it first."""
    q, k, v = F.normalize(inputs.q, dim=-1), F.normalize(inputs.k, dim=-1), inputs.v
    if case.kv_heads != case.heads:
        k, v = (tensor.repeat_interleave(case.heads // case.kv_heads, dim=1) for tensor in (k, v))
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * SCALE
    hidden = _hidden(inputs, case)
    if inputs.bias is not None:
        scores = scores + inputs.bias
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.finfo(scores.dtype).max)
    return torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v)


def l2norm(*tensors: Tensor) -> list[Tensor]:
    """Each tensor's rows of length 1."""
    return [F.normalize(tensor, dim=-1) for tensor in tensors]


@cache
def compiled_l2norm() -> Callable[..., list[Tensor]]:
    """l2norm() as torch.compile makes it: one kernel for all tensors each way, whatever the number of rows."""

    @torch.compile(fullgraph=True, dynamic=True)
    def rows(*flat: Tensor) -> list[Tensor]:
        return l2norm(*flat)

    def normalise(*tensors: Tensor) -> list[Tensor]:
        # as rows: one compilation serves every batch, number of heads and length
        flat = rows(*(tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors))
        return [part.view(tensor.shape) for part, tensor in zip(flat, tensors, strict=True)]

    return normalise


def sdpa(inputs: Inputs, case: Case, normalise: bool, norm: Callable[..., list[Tensor]] = l2norm) -> Tensor:
    """PyTorch's scaled_dot_product_attention, with or without l2norm before it."""
    q, k = norm(inputs.q, inputs.k) if normalise else (inputs.q, inputs.k)
    attn_mask, is_causal = inputs.bias, case.causal
    if inputs.mask is not None or inputs.bias is not None:
        hidden, is_causal = _hidden(inputs, case), False
        if attn_mask is None:
            attn_mask = ~hidden
        elif hidden is not None:
            attn_mask = attn_mask.masked_fill(hidden, -math.inf)
    scale = SCALE if normalise else None
    return F.scaled_dot_product_attention(
        q, k, inputs.v, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=case.kv_heads != case.heads
    )


def compiled_norm_sdpa(inputs: Inputs, case: Case) -> Tensor:
    """The same with the norms compiled: what to write today for cosine-sim attention without a kernel for it."""
    return sdpa(inputs, case, normalise=True, norm=compiled_l2norm())


def cache_normalised_keys(inputs: Inputs) -> Inputs:
    """The keys normalised, as a key/value cache may keep them: once for all the queries to come."""
    return replace(inputs, k=F.normalize(inputs.k, dim=-1))


def ours_cached(inputs: Inputs, case: Case, backend: str) -> Tensor:
    """flash_cosine_sim_attention over a cache of normalised keys."""
    (q,) = _norm_of_query(inputs.q)
    return flash_cosine_sim_attention(
        q, inputs.k, inputs.v, inputs.mask, inputs.bias, SCALE, causal=case.causal, l2norm_qk=False, backend=backend
    )


def sdpa_cached(inputs: Inputs, case: Case) -> Tensor:
    """PyTorch's scaled_dot_product_attention over a cache of normalised keys."""
    return sdpa(inputs, case, normalise=True, norm=lambda q, k: [*_norm_of_query(q), k])


def _norm_of_query(q: Tensor) -> list[Tensor]:
    # one kernel on a GPU; a CPU starts none, and may have no compiler
    return compiled_l2norm()(q) if q.is_cuda else l2norm(q)


def flash_attention(inputs: Inputs, case: Case, attend: Callable) -> Tensor:
    """FlashAttention-3's or -4's flash_attn_func, which takes (batch, seq_len, heads, head_dim)."""
    if inputs.q.dtype == torch.float32 or inputs.mask is not None or inputs.bias is not None:
        raise ValueError("it takes float16 and bfloat16, no mask and no bias")
    q, k, v = (tensor.transpose(1, 2) for tensor in (inputs.q, inputs.k, inputs.v))
    result = attend(q, k, v, causal=case.causal)
    o = result[0] if isinstance(result, tuple) else result  # some versions return the log-sum-exp with it
    return o.transpose(1, 2)


def predecessor(inputs: Inputs, case: Case, attend: Callable) -> Tensor:
    """The predecessor's function; 0.2 has no argument for a bias."""
    bias = {} if inputs.bias is None else {"attn_bias": inputs.bias}
    return attend(inputs.q, inputs.k, inputs.v, mask=inputs.mask, scale=SCALE, causal=case.causal, **bias)


def unavailable(_inputs: Inputs, _case: Case, error: Exception) -> Tensor:
    """Stands for a package that is installed and could not be imported."""
    raise error


def _hidden(inputs: Inputs, case: Case) -> Tensor | None:
    hidden = None if inputs.mask is None else ~inputs.mask[:, None, None, :]
    if case.causal:
        above = torch.ones(case.seq_len, case.seq_len, dtype=torch.bool, device=inputs.q.device).triu(1)
        hidden = above if hidden is None else hidden | above
    return hidden


@dataclass(frozen=True)
class Contender:
    """A function of (inputs, case).

    ``cosine``: it normalises q and k; ``kernel``: the one that SDPA is held to; ``folder``: the predecessor's, whose
    calls can crash the process, so that another one tries them first; ``prepare``: what is made of the inputs once,
    before its calls and outside their time.
    """

    name: str
    attend: Callable[[Inputs, Case], Tensor]
    cosine: bool
    kernel: SDPBackend | None = None
    folder: Path | None = None
    prepare: Callable[[Inputs], Inputs] | None = None

    def prepared(self, inputs: Inputs) -> Inputs:
        """What its calls are given."""
        return inputs if self.prepare is None else self.prepare(inputs)

    def setting(self) -> AbstractContextManager:
        """What its calls are made in, entered once around many of them, for entering takes time."""
        return nullcontext() if self.kernel is None else sdpa_kernel(self.kernel)


CACHED = ", keys normalised when cached"


def contenders(
    backends: list[str], device: torch.device, predecessor_folder: Path | None = None, decoding: bool = False
) -> tuple[list[Contender], list[str]]:
    """Ours first, by each back end asked for, then all that is installed; and the names of what is not installed.

    ``decoding`` adds those that find their keys normalised: a query comes after the keys of many others.
    """
    found = [Contender(f"ours ({backend})", partial(ours, backend=backend), True) for backend in backends]
    if decoding:
        for backend in backends:
            attend = partial(ours_cached, backend=backend)
            found.append(Contender(f"ours ({backend}){CACHED}", attend, True, prepare=cache_normalised_keys))
    found.append(Contender("naive einsum", naive, True))
    absent = []
    if predecessor_folder is None:
        absent.append("predecessor (--predecessor)")
    else:
        found += predecessors(predecessor_folder)
    kernels = [("flash", SDPBackend.FLASH_ATTENTION)]
    if device.type == "cuda":
        kernels += [("cudnn", SDPBackend.CUDNN_ATTENTION), ("efficient", SDPBackend.EFFICIENT_ATTENTION)]
    for name, kernel in kernels:
        found.append(Contender(f"l2norm + SDPA {name}", partial(sdpa, normalise=True), True, kernel))
        if device.type == "cuda" and name != "efficient":
            found.append(Contender(f"compiled l2norm + SDPA {name}", compiled_norm_sdpa, True, kernel))
        if decoding:
            found.append(Contender(f"SDPA {name}{CACHED}", sdpa_cached, True, kernel, prepare=cache_normalised_keys))
    for name, kernel in kernels:
        found.append(Contender(f"SDPA {name}, no norm", partial(sdpa, normalise=False), False, kernel))
    for name, (module, _) in FLASH_ATTENTION.items():
        try:
            attend = partial(flash_attention, attend=importlib.import_module(module).flash_attn_func)
        except Exception as error:
            if is_absent(error, module):
                absent.append(name)
                continue
            attend = partial(unavailable, error=error)
        found.append(Contender(f"{name}, no norm", attend, False))
    return found, absent


def is_absent(error: Exception, module: str) -> bool:
    """Whether importing a module failed because it, or a package that it is in, is not installed."""
    return isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}.")


def predecessors(folder: Path) -> list[Contender]:
    """The predecessor's contenders: its CUDA kernel, and its Triton one if it has that.

    Raises ValueError where the folder has no such package.
    """
    spec = PathFinder.find_spec(PREDECESSOR, [str(folder)])
    if spec is None or spec.origin is None:
        raise ValueError(f"--predecessor {folder} has no {PREDECESSOR}; {INSTALL_PREDECESSOR} puts it there")
    name = f"predecessor {installed_version(PREDECESSOR, path=[str(folder)]) or ''}".rstrip()
    try:
        package = _import_apart(spec, folder)
    except Exception as error:
        return [Contender(name, partial(unavailable, error=error), True)]
    functions = [(name, package.flash_cosine_sim_attention)]
    triton = getattr(package, "triton_flash_cosine_sim_attention", None)
    if triton is not None:
        functions.append((f"{name} Triton", triton))
    return [Contender(name, partial(predecessor, attend=attend), True, folder=folder) for name, attend in functions]


def _import_apart(spec: ModuleSpec, folder: Path) -> ModuleType:
    """Imports the package of the same name as ours that lies in ``folder``, beside ours.

    While it is imported, the name is its own, so that it finds its modules; then sys.modules has ours again. What it
    depends on comes from this environment, and from the folder only what is nowhere else: its compiled extension.
    """
    saved = _take_modules()
    sys.path.append(str(folder))
    try:
        package = sys.modules[PREDECESSOR] = module_from_spec(spec)
        spec.loader.exec_module(package)
        return package
    finally:
        sys.path.remove(str(folder))
        _take_modules()
        sys.modules.update(saved)


def _take_modules() -> dict[str, ModuleType]:
    """Removes the package and its submodules from sys.modules."""
    names = [name for name in sys.modules if name == PREDECESSOR or name.startswith(f"{PREDECESSOR}.")]
    return {name: sys.modules.pop(name) for name in names}


def versions(predecessor_folder: Path | None) -> dict[str, str | None]:
    """The versions of what is compared with ours."""
    packages = ("triton", *(distribution for _, distribution in FLASH_ATTENTION.values()))
    found = {package: installed_version(package) for package in packages}
    if predecessor_folder is not None:
        found["predecessor"] = installed_version(PREDECESSOR, path=[str(predecessor_folder)])
    return found


def installed_version(package: str, **where: list[str]) -> str | None:
    """The version of an installed package, looked for on ``path`` (default: sys.path); None where there is none."""
    return next((distribution.version for distribution in distributions(name=package, **where)), None)
