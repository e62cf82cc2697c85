"""Every CUDA kernel once, on a few tiles, for compute-sanitizer to watch: see docs/design/testing.md.

    export PYTHONPATH=kernels PYTORCH_NO_CUDA_MEMORY_CACHING=1
    compute-sanitizer --tool memcheck --error-exitcode 1 python tests/kernel_sanitizer.py --quick --tool memcheck

Inputs are made on the CPU and copied, results are copied back and compared there, so that hardly any kernel but the
library's own runs. Each launch is named before it starts: where the tool stops, or the GPU hangs, is the last line.
"""

import argparse
import os
import sys
import time
from dataclasses import dataclass, replace

import torch

from flash_cosine_sim_attention import ops

operators = torch.ops.flash_cosine_sim_attention
FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
# Generous: test_kernels.py judges accuracy. Here a result is right or it is not.
LIMITS = {FLOAT32: 1e-4, FLOAT16: 1e-2, BFLOAT16: 5e-2}
TF32_LIMIT = 1e-2
ALL = ("dq", "dk", "dv", "dbias", "dscale", "ddistance_bias")
HEAD_DIMS = (16, 32, 64, 96, 128, 256)
SM90_HEAD_DIMS = (32, 64, 96, 128, 256, 40, 136)
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


@dataclass(frozen=True)
class Launch:
    """A forward pass and, if it needs gradients, a backward pass.

    The lengths are two to three tiles of most kernels, and no multiple of one.
    """

    dtype: torch.dtype = BFLOAT16
    head_dim: int = 64
    num_heads: int = 2
    num_kv_heads: int = 2
    seq_len_q: int = 150
    seq_len_k: int = 140
    causal: bool = False
    mask: bool = False
    bias: str | None = None  # "full", or what of the shape is not 1: "heads", "plane", "keys"
    scale: str = "number"  # or "heads", "scalar"
    groups: int = 1
    l2norm_qk: bool = True
    tf32: bool = False
    partials: bool = False
    row_sum_gradient: bool = False
    deterministic: bool = False
    needs: tuple[str, ...] = ALL
    window: tuple[int, int] = (-1, -1)
    packed: tuple[int, ...] = ()  # cu_seqlens of queries and keys; batch is 1
    distances: str = ""  # "table", "alibi" or "both"
    layout: str = "heads"  # "seq_first": (batch, seq_len, heads, head_dim); "offset": rows that are not aligned

    def lies(self) -> bool:
        """Whether cu_seqlens are wrong: then nothing but where the kernels read and write matters."""
        lengths = self.seq_len_q, self.seq_len_k
        return bool(self.packed) and (list(self.packed) != sorted(self.packed) or self.packed[-1] > min(lengths))

    def reads_pieces(self) -> bool:
        """Whether all lanes of Hopper's warps read what TMA brought of a table by distance, and one lane arrives.

        racecheck orders what the arriving thread has read, and nothing else: docs/design/testing.md.
        """
        scored = self.distances or (not self.l2norm_qk and self.scale == "number")
        return bool(scored) and self.dtype == BFLOAT16 and self.bias is None

    def name(self) -> str:
        shown = [str(self.dtype).removeprefix("torch."), f"d{self.head_dim}"]
        for field, default in vars(Launch()).items():
            value = getattr(self, field)
            if field not in ("dtype", "head_dim") and value != default:
                shown.append(f"{field}={','.join(map(str, value)) if isinstance(value, tuple) else value}")
        return " ".join(shown)


def launches(quick: bool) -> list[Launch]:
    everything = Launch(causal=True, mask=True, bias="full", scale="heads")
    plain = Launch(mask=True)  # in float16 other kernels than with a bias, which may lift P out of its range
    head_dims = (64, 256) if quick else HEAD_DIMS
    found = [
        replace(everything, dtype=dtype, head_dim=head_dim)
        for dtype in (BFLOAT16, FLOAT16, FLOAT32)
        for head_dim in head_dims
    ]
    found += [replace(plain, dtype=FLOAT16, head_dim=head_dim) for head_dim in head_dims]
    found += [replace(everything, dtype=FLOAT32, head_dim=head_dim, tf32=True) for head_dim in head_dims]
    group_of_heads = replace(plain, num_heads=4, num_kv_heads=1, scale="heads", seq_len_q=200)
    found += [
        group_of_heads,
        replace(everything, deterministic=True, num_kv_heads=1),
        replace(plain, partials=True, head_dim=40),
        replace(plain, layout="offset", causal=True, groups=2),
    ]
    # The kernels of compute capability 9.0 take no bias, have larger tiles and leave few queries to others. So many
    # heads are 144 to 192 tiles: more than such a GPU has multiprocessors, so that blocks go on to a second one.
    sm90 = Launch(num_heads=24, seq_len_q=400, seq_len_k=300, causal=True, needs=())
    sm90_mask = replace(sm90, dtype=FLOAT16, causal=False, mask=True)
    sm90_backward = replace(sm90, num_kv_heads=24, seq_len_q=200, needs=("dq", "dk", "dv"))
    found += [replace(sm90, head_dim=head_dim) for head_dim in ((64, 128, 256) if quick else SM90_HEAD_DIMS)]
    found += [replace(sm90_mask, head_dim=head_dim) for head_dim in ((96,) if quick else SM90_HEAD_DIMS)]
    found += [replace(sm90, partials=True)]
    # So many rows that the backward kernel itself normalises them: heuristics.h says how many.
    rows_ahead = replace(sm90_backward, num_heads=14, num_kv_heads=14, seq_len_q=530, seq_len_k=520, causal=False)
    found += [rows_ahead]
    # Windows and packed sequences, of which the last lie: cu_seqlens that fall, and end outside.
    banded = replace(sm90_backward, num_heads=14, num_kv_heads=14, seq_len_q=530, seq_len_k=520)
    found += [
        replace(banded, window=(100, -1)),
        replace(banded, causal=False, window=(40, 70), mask=True, head_dim=128),
        replace(banded, packed=(0, 200, 200, 470), head_dim=128, deterministic=True),
        replace(banded, packed=(0, 130, 131, 500), window=(60, -1)),
        replace(banded, packed=(0, 900, -50, 300), num_heads=4, num_kv_heads=2),
        replace(everything, bias=None, mask=False, dtype=FLOAT32, packed=(0, 90, 40, 1000)),
        replace(everything, dtype=FLOAT32, window=(30, -1)),
    ]
    # What distances add, with the table's gradient in any order and in one.
    scored = replace(banded, distances="both", needs=ALL)
    found += [
        replace(scored, distances="table"),
        replace(scored, head_dim=128, deterministic=True),
        replace(scored, packed=(0, 200, 200, 470), head_dim=96),
        replace(scored, packed=(0, 900, -50, 300), num_heads=4, num_kv_heads=2),
        replace(banded, l2norm_qk=False, window=(100, -1)),  # the same kernel backward
        replace(everything, distances="both"),
        replace(everything, dtype=FLOAT32, distances="table", causal=False, num_kv_heads=1),
    ]
    if quick:
        return [*found, sm90_backward, replace(sm90_backward, head_dim=128, deterministic=True)]
    for dtype in (BFLOAT16, FLOAT16):
        for deterministic in (False, True):
            launch = replace(sm90_backward, dtype=dtype, mask=dtype == FLOAT16, deterministic=deterministic)
            found += [replace(launch, head_dim=head_dim) for head_dim in SM90_HEAD_DIMS]
    for dtype in (BFLOAT16, FLOAT16, FLOAT32):
        found += [
            replace(everything, dtype=dtype, deterministic=True, head_dim=256),
            replace(plain, dtype=dtype, deterministic=True, causal=True),
            replace(group_of_heads, dtype=dtype, head_dim=128, deterministic=True),
            replace(plain, dtype=dtype, partials=True, head_dim=200),
            replace(plain, dtype=dtype, row_sum_gradient=True, head_dim=8, groups=2),
            replace(everything, dtype=dtype, head_dim=40, groups=40, layout="seq_first"),
            replace(everything, dtype=dtype, l2norm_qk=False, scale="scalar", bias="keys"),
        ]
    found += [
        replace(plain, bias="heads", causal=True),
        replace(plain, bias="plane", num_kv_heads=1),
        replace(everything, layout="seq_first", groups=4),
        replace(everything, layout="offset", head_dim=96),
        Launch(seq_len_q=1, seq_len_k=300, num_heads=4, num_kv_heads=1, causal=True),
        Launch(seq_len_q=1, seq_len_k=1),
        Launch(seq_len_q=64, seq_len_k=64, causal=True),
        Launch(seq_len_q=150, seq_len_k=20, causal=True, bias="full"),  # most rows see no key
        Launch(seq_len_q=20, seq_len_k=300, causal=True),
        *[replace(everything, needs=(name,)) for name in ALL],
        *[replace(everything, needs=(name,), num_kv_heads=1, head_dim=256) for name in ("dk", "dv")],
    ]
    return found


def make_inputs(launch: Launch) -> list:
    """q, k, v, mask, attn_bias, scale, both cu_seqlens, distance_bias, alibi_slopes and scale_value, on the CPU."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator).to(launch.dtype)

    batch = 1 if launch.packed else 2
    num_heads, seq_len_q, seq_len_k = launch.num_heads, launch.seq_len_q, launch.seq_len_k
    q = randn(batch, num_heads, seq_len_q, launch.head_dim)
    k, v = (randn(batch, launch.num_kv_heads, seq_len_k, launch.head_dim) for _ in range(2))
    if not launch.l2norm_qk:
        q, k = (torch.nn.functional.normalize(tensor.float(), dim=-1).to(launch.dtype) for tensor in (q, k))
    mask = None
    if launch.mask:
        mask = torch.rand(batch, seq_len_k, generator=generator) < 0.7
        mask[1:] = False
    bias_shapes = {
        "full": (batch, num_heads, seq_len_q, seq_len_k),
        "heads": (1, num_heads, seq_len_q, seq_len_k),
        "plane": (1, 1, seq_len_q, seq_len_k),
        "keys": (1, 1, 1, seq_len_k),
    }
    bias = randn(*bias_shapes[launch.bias]) if launch.bias else None
    scale = {"number": None, "heads": torch.linspace(1, 8, num_heads), "scalar": torch.tensor([8.0])}[launch.scale]
    if scale is not None:
        scale = scale / launch.groups
    cu_seqlens = torch.tensor(launch.packed, dtype=torch.int32) if launch.packed else None
    table = slopes = None
    if launch.distances in ("table", "both"):
        table = torch.randn(num_heads, seq_len_k if launch.causal else seq_len_q + seq_len_k - 1, generator=generator)
    if launch.distances in ("alibi", "both"):
        slopes = 0.1 * torch.rand(1 if launch.packed else batch, num_heads, generator=generator)
    return [q, k, v, mask, bias, scale, cu_seqlens, cu_seqlens, table, slopes, 8.0 / launch.groups]


def on_device(tensor, device: str, layout: str = "heads"):
    """Copied as a whole; the view that a layout is comes after that."""
    if not isinstance(tensor, torch.Tensor):
        return tensor
    if layout == "seq_first":
        return tensor.transpose(1, 2).contiguous().to(device).transpose(1, 2)
    if layout == "offset":
        return torch.nn.functional.pad(tensor, (1, 2)).to(device)[..., 1:-2]
    return tensor.to(device)


def unseen_outputs(launch: Launch) -> tuple[str, ...]:
    """What kernels of compute capability 9.0 write by TMA, if they run: to initcheck nobody has written it."""
    is_taken = launch.dtype != FLOAT32 and launch.bias is None  # or may be: plan.cpp decides
    return ("o", "dk", "dv") if is_taken and torch.cuda.get_device_capability() == (9, 0) else ()


def run(launch: Launch, device: str, tool: str | None) -> list[str]:
    """Returns what is wrong."""
    inputs = make_inputs(launch)
    window = launch.window[0], 0 if launch.causal else launch.window[1]
    first_distance = 0 if launch.causal else 1 - launch.seq_len_q
    options = launch.groups, launch.causal, *window, first_distance, launch.l2norm_qk, launch.tf32
    needs = [name in launch.needs for name in ALL]
    needs[3] &= inputs[4] is not None
    needs[4] &= inputs[5] is not None
    needs[5] &= inputs[8] is not None
    generator = torch.Generator().manual_seed(1)
    do = torch.randn(inputs[0].shape, generator=generator).to(launch.dtype)
    drow_sum_log2 = torch.randn(do.shape[:-1], generator=generator) if launch.row_sum_gradient else None
    names = ("numerator", "denominator") if launch.partials else ("o", "row_sum_log2", *(ALL if any(needs) else ()))

    expected = {}
    if launch.lies() and device == "cpu":
        return []
    for where, layout in ((device, launch.layout),) if launch.lies() else (("cpu", "heads"), (device, launch.layout)):
        unseen = unseen_outputs(launch) if tool == "initcheck" and where != "cpu" else ()
        tensors = [on_device(tensor, where, layout) for tensor in inputs[:3]]
        tensors += [on_device(tensor, where) for tensor in inputs[3:]]
        if launch.packed:
            tensors[7] = tensors[6]  # one tensor: Hopper's kernels ask for that
        if launch.partials:
            outputs = operators.partials(*tensors, *options)
        else:
            outputs = list(operators.forward(*tensors, *options, any(needs)))
            if any(needs):
                o = outputs[0]
                if "o" in unseen:
                    o = on_device(torch.zeros_like(do) if launch.lies() else expected["o"], where)
                rows = [o, outputs[1]]
                gradients = (on_device(do, where, layout), *tensors, *rows, on_device(drow_sum_log2, where))
                outputs += operators.backward(*gradients, *options, *needs, launch.deterministic)
        found = {name: output.cpu() for name, output in zip(names, outputs, strict=True) if name not in unseen}
        expected = expected or found

    limit = TF32_LIMIT if launch.tf32 else LIMITS[launch.dtype]
    wrong = []
    for name, ours in found.items():
        right = expected[name]
        if ours.shape != right.shape or ours.dtype != right.dtype:
            wrong.append(f"{name} is {ours.dtype} {tuple(ours.shape)}")
            continue
        ours, right = ours.double(), right.double()
        is_number = right.isfinite()
        if not torch.equal(ours[~is_number], right[~is_number]):
            wrong.append(f"{name} is not -inf where it should be")
        error, size = (ours - right)[is_number].norm().item(), right[is_number].norm().item()
        if not error <= limit * (size + 0.03 * right.numel() ** 0.5):  # some gradients are 0
            wrong.append(f"{name} is off by {error:.1e} of {size:.1e}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two head dims and the main options")
    parser.add_argument("--only", default="", metavar="TEXT", help="only launches with TEXT in their names")
    parser.add_argument("--list", action="store_true", help="print the launches' names and stop")
    parser.add_argument("--tool", choices=TOOLS, help="which one watches; initcheck does not see all writes")
    parser.add_argument("--device", default="cuda", help="cpu runs the reference implementation (default: cuda)")
    arguments = parser.parse_args()
    chosen = [launch for launch in launches(arguments.quick) if arguments.only in launch.name()]
    if arguments.tool == "racecheck":
        chosen = [launch for launch in chosen if not launch.reads_pieces()]
    if not chosen:
        raise SystemExit(f"no launch has {arguments.only!r} in its name; --list prints them")
    if arguments.list:
        print("\n".join(launch.name() for launch in chosen))
        return 0
    if arguments.device == "cuda" and not ops.kernels_available():
        raise SystemExit(f"the CUDA kernels are not available: {ops.kernels_error()}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("PyTorch sees no CUDA GPU")
    if arguments.tool in ("memcheck", "initcheck") and not os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING"):
        raise SystemExit(f"{arguments.tool} needs PYTORCH_NO_CUDA_MEMORY_CACHING=1: see docs/design/testing.md")

    failures = 0
    start = time.monotonic()
    for index, launch in enumerate(chosen):
        print(f"[{index + 1}/{len(chosen)}] {launch.name()}", end="", flush=True)
        launched = time.monotonic()
        wrong = run(launch, arguments.device, arguments.tool)
        print(f"  {time.monotonic() - launched:.1f} s" + "".join(f"\n    WRONG: {line}" for line in wrong), flush=True)
        failures += bool(wrong)
    print(f"{len(chosen)} launches, {failures} wrong, {time.monotonic() - start:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
