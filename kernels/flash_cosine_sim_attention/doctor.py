"""What serves here, what does not and why, whether it computes what it should, and how fast.

    python -m flash_cosine_sim_attention.doctor
    python -m flash_cosine_sim_attention.doctor --json report.json    # the same for a program, to send

Exit status: 0, the CUDA kernels serve and are right; 1, they do not serve, and PyTorch's SDPA computes instead; 2, the
command line is wrong; 3, something computes wrong results, or fails.
"""

import argparse
import json
import math
import os
import platform
import re
import statistics
import struct
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops
from .doctor_text import Problem, Report, rendered
from .identity import __version__, warn_of_others
from .interface import FASTER_BY_SDPA, flash_cosine_sim_attention, plain_cosine_sim_attention

FOLDER = Path(__file__).parent
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# The largest relative RMS error against float64, of the output; of gradients, which are rounded more often, twice that.
LIMITS = {"bfloat16": 6e-3, "float16": 1e-3, "float32": 1e-5}
# Every kernel of 16 bits, and lengths that no tile divides: (head_dim, num_kv_heads, causal, with a mask, with a bias).
CASES = ((64, 8, True, False, False), (128, 2, False, True, False), (256, 8, True, False, False),
         (64, 8, False, False, True))  # fmt: skip
SPEED_HEAD_DIMS = (64, 128)
SPEED_SHAPE = {"batch": 4, "num_heads": 16, "seq_len": 4096}

# (what an error of CUDA says, cure)
CURES = (
    ("driver version is insufficient", "update the NVIDIA driver, or build from source with an older CUDA toolkit"),
    ("driver on your system is too old", "update the NVIDIA driver, or install a torch built with an older CUDA"),
    ("no kernel image", "build from source on this machine: its GPU is not among those of this library"),
    ("out of memory", "free memory on the GPU and run this again"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m flash_cosine_sim_attention.doctor",
        description="What serves here, what does not and why, whether it is right, and how fast.",
    )
    parser.add_argument("--json", metavar="FILE", help="write the report there, too; - is stdout, in place of the text")
    parser.add_argument("--no-speed", action="store_true", help="time nothing")
    arguments = parser.parse_args(argv)
    torch.backends.cuda.matmul.fp32_precision = "ieee"  # else float32's products may be TF32's
    report = examine(speed=not arguments.no_speed)
    if arguments.json != "-":
        say("\n".join(rendered(report)))
    if arguments.json is not None:
        text = json.dumps(without_nan(report), indent=1, allow_nan=False)
        if arguments.json == "-":
            say(text)
        else:
            try:
                Path(arguments.json).write_text(text + "\n", encoding="utf-8")
            except OSError as error:
                parser.exit(2, f"error: --json {arguments.json} cannot be written: {error.strerror}\n")
    return int(report["exit_status"])


def without_nan(value: Any) -> Any:
    """With "nan" and "inf" for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: without_nan(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def say(text: str) -> None:
    """Print, also where who reads has seen enough before the end, as head does."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python writes at its end


def examine(speed: bool = True) -> Report:
    """The whole report: versions, gpus, library, problems, self_test, speed, exit_status. No paths, no names."""
    smi = nvidia_smi()
    gpus, problems = find_gpus(smi)
    library = examine_library()
    problems += other_installations() + problems_of_library(library, gpus)
    serves = bool(gpus) and ops.kernels_available() and gpus[0]["capability"] >= [8, 0]
    device = "cuda" if gpus else "cpu"
    self_test = [test_one(device, "cuda" if serves else "sdpa", name, case) for name in DTYPES for case in CASES]
    problems += problems_of_self_test(self_test)
    wrong = any(not one["right"] for one in self_test)
    times = time_all(problems) if speed and serves and not wrong else []
    return {
        "flash_cosine_sim_attention": __version__,
        "torch": torch.__version__,
        "cuda_of_torch": torch.version.cuda,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "driver": smi[0]["driver"] if smi else None,
        "gpus": gpus,
        "library": library,
        "kernels": kernels_by_case(gpus, library) if serves else [],
        "serves": serves,
        "long_calls_by": "cuda" if serves and gpus[0]["capability"][0] not in FASTER_BY_SDPA else "sdpa",
        "problems": problems,
        "self_test": self_test,
        "speed": times,
        "exit_status": 3 if wrong else 0 if serves else 1,
    }


# What is there


def nvidia_smi() -> list[dict[str, str]]:
    """Every GPU as the driver sees it: driver, name, capability. Empty where there is no driver, or it fails."""
    command = ["nvidia-smi", "--query-gpu=driver_version,name,compute_cap", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [line.split(", ") for line in result.stdout.splitlines()]
    return [dict(zip(("driver", "name", "capability"), row, strict=True)) for row in rows if len(row) == 3]


def find_gpus(smi: list[dict[str, str]]) -> tuple[list[dict[str, Any]], list[Problem]]:
    """The GPUs that torch can use; if there are none, why."""
    if torch.cuda.is_available():
        found = []
        for index in range(torch.cuda.device_count()):
            name, capability = torch.cuda.get_device_name(index), list(torch.cuda.get_device_capability(index))
            found.append({"name": name, "capability": capability})
        return found, []
    return [], [why_no_gpu(smi)]


def why_no_gpu(smi: list[dict[str, str]]) -> Problem:
    seen = f"{len(smi)} GPU{'s' * (len(smi) > 1)} ({smi[0]['name']}, driver {smi[0]['driver']})" if smi else ""
    if torch.version.cuda is None:
        why = f"torch {torch.__version__} is not a CUDA build"
        if smi:
            return problem(f"{why}, although there {'are' if len(smi) > 1 else 'is'} {seen}",
                           "install a CUDA build of torch")  # fmt: skip
        return problem(f"{why}, and no NVIDIA driver answers", "none on this machine, unless it has an NVIDIA GPU")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and smi and hides_all(visible, len(smi)):
        return problem(f"CUDA_VISIBLE_DEVICES={visible!r} hides {seen}", "unset CUDA_VISIBLE_DEVICES")
    said = why_cuda_does_not_start()
    cure = cure_of(said, "check the driver with nvidia-smi" if smi else "install the NVIDIA driver, if there is a GPU")
    return problem(f"torch {torch.__version__} (CUDA {torch.version.cuda}) sees no GPU: {said}", cure)


def hides_all(visible: str, num_gpus: int) -> bool:
    """Whether CUDA_VISIBLE_DEVICES leaves none of so many GPUs: CUDA reads it up to the first that is not there.

    Schedulers set it to GPUs that are there, and then something else is wrong. Names of GPUs are taken for right.
    """
    first = visible.split(",")[0].strip()
    return int(first) >= num_gpus if first.isdecimal() else not first.startswith(("GPU-", "MIG-"))


def why_cuda_does_not_start() -> str:
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except Exception as error:  # of any type: torch's, CUDA's, an assertion
        return first_line(error)
    return "torch.cuda.is_available() is False"


def examine_library() -> Report:
    """The compiled library: whether it is there and loads, and what it was compiled for."""
    paths = sorted(FOLDER.glob("_C*.so"))
    error = ops.kernels_error()
    return {
        "file": paths[0].name if paths else None,
        "error": error if error is None else error.replace(f"{FOLDER}{os.sep}", ""),
        **(compiled_for(paths[0]) if paths else {"architectures": [], "ptx": []}),
    }


def compiled_for(library: Path) -> dict[str, list[str]]:
    """The compute capabilities that a library has code and PTX for: those of the entries of its fat binaries."""
    content = library.read_bytes()
    found: dict[int, set[int]] = {1: set(), 2: set()}  # by kind of entry: PTX, code
    for header in re.finditer(re.escape(b"\x50\xed\x55\xba\x01\x00\x10\x00"), content):
        offset, end = header.end() + 8, header.end() + 8 + struct.unpack_from("<Q", content, header.end())[0]
        while offset + 32 <= min(end, len(content)):
            kind, _, header_size, size, architecture = struct.unpack_from("<HHIQ12xI", content, offset)
            found.setdefault(kind, set()).add(architecture)
            offset += header_size + size
    code = [f"{number / 10}" for number in sorted(found[2])]
    if b"sm_90a" in content:  # Hopper's own kernels; an entry's number does not tell
        code = ["9.0a" if name == "9.0" else name for name in code]
    return {"architectures": code, "ptx": [f"{number / 10}" for number in sorted(found[1])]}


# What is wrong


def problem(why: str, cure: str) -> Problem:
    return {"why": why, "cure": cure}


def other_installations() -> list[Problem]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_others()
    if not caught:
        return []
    # The message has paths, which are nobody else's business; it was printed when the package was imported.
    return [problem("another package of this name is installed, too: the warning above says where",
                    "pip uninstall flash-cosine-sim-attention until it finds none, and install again")]  # fmt: skip


def problems_of_library(library: Report, gpus: list[dict[str, Any]]) -> list[Problem]:
    found = []
    if library["file"] is None:
        cure = (
            'install from source with nvcc on PATH: pip install "setuptools>=77" wheel ninja && '
            "FLASH_COSINE_SIM_FORCE_CUDA=1 pip install --no-build-isolation ."
        )
        found.append(problem("this package has no compiled kernels", cure))
    elif library["error"] is not None:
        cure = cure_of(library["error"], "build it again, with this version's sources")
        found.append(problem(f"the compiled kernels do not serve: {library['error']}", cure))
    for index, gpu in enumerate(gpus):
        found += problems_of_gpu(f"GPU {index} ({gpu['name']})", gpu["capability"], library)
    return found


def problems_of_gpu(name: str, capability: list[int], library: Report) -> list[Problem]:
    major, minor = capability
    if capability < [8, 0]:
        return [
            problem(f"{name} has compute capability {major}.{minor}, and the kernels need 8.0", "none: SDPA serves")
        ]
    if library["error"] is not None:
        return []
    rebuild = f"build from source with TORCH_CUDA_ARCH_LIST={major}.{minor}{'a' * (capability == [9, 0])}"
    if not runs_on(capability, library):
        has = ", ".join([*library["architectures"], *(f"PTX {ptx}" for ptx in library["ptx"])])
        return [problem(f"{name} has compute capability {major}.{minor}, the library code for {has}", rebuild)]
    if capability == [9, 0] and "9.0a" not in library["architectures"]:
        return [problem(f"{name} runs the portable kernels: the library was built without Hopper's", rebuild)]
    return []


def runs_on(capability: list[int], library: Report) -> bool:
    """Code runs on its own and later minor versions, PTX on whatever is later. True where nothing is known."""
    code, ptx = ([[int(part) for part in name.rstrip("a").split(".")] for name in library[kind]]
                 for kind in ("architectures", "ptx"))  # fmt: skip
    native = any(one[0] == capability[0] and one[1] <= capability[1] for one in code)
    return native or any(one <= capability for one in ptx) or not (code or ptx)


def problems_of_self_test(self_test: list[Report]) -> list[Problem]:
    failed = [one for one in self_test if one["error"] is not None]
    wrong = [one for one in self_test if one["error"] is None and not one["right"]]
    found = []
    if failed:
        said = failed[0]["error"]
        found.append(problem(f"{len(failed)} of {len(self_test)} self-tests fail, first {name_of(failed[0])}: {said}",
                             cure_of(said, "report it as an issue, with what --json writes")))  # fmt: skip
    if wrong:
        found.append(problem(f"{len(wrong)} of {len(self_test)} self-tests are wrong, first {name_of(wrong[0])}",
                             "do not train with it, and report it as an issue, with what --json writes"))  # fmt: skip
    return found


def name_of(one: Report) -> str:
    extras = [name for name in ("causal", "mask", "bias") if one[name]]
    return ", ".join([one["dtype"], f"head dim {one['head_dim']}", *extras])


def cure_of(said: str, otherwise: str) -> str:
    return next((cure for part, cure in CURES if part in said), otherwise)


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


def kernels_by_case(gpus: list[dict[str, Any]], library: Report) -> list[Report]:
    """Which kernels serve on the first GPU, by dtype, direction and head dim."""
    hopper = gpus[0]["capability"] == [9, 0] and "9.0a" in library["architectures"]
    found = []
    for dtype in DTYPES:
        for direction, most in (("forward", 256), ("backward", 128)):
            native = hopper and dtype != "float32"
            if native:
                found.append({"dtype": dtype, "direction": direction, "head_dims": [8, most], "kernels": "Hopper"})
            if not native or most < 256:
                dims = [most + 8 if native else 8, 256]
                found.append({"dtype": dtype, "direction": direction, "head_dims": dims, "kernels": "portable"})
    return found


# Whether it is right, and how fast


def test_one(device: str, backend: str, dtype: str, case: tuple[int, int, bool, bool, bool]) -> Report:
    """Relative RMS errors against float64 of the output and the gradients, and whether they are within LIMITS."""
    head_dim, num_kv_heads, causal, masked, biased = case
    found: Report = {"backend": backend, "dtype": dtype, "head_dim": head_dim, "num_kv_heads": num_kv_heads,
                     "causal": causal, "mask": masked, "bias": biased, "errors": {}, "error": None}  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"q": (2, 8, 193, head_dim)}
    shapes |= dict.fromkeys(("k", "v"), (2, num_kv_heads, 193, head_dim))
    if biased:
        shapes["attn_bias"] = (8, 193, 193)
    low = {name: torch.randn(shape, generator=generator).to(DTYPES[dtype]) for name, shape in shapes.items()}
    mask = torch.rand(2, 193, generator=generator) > 0.3 if masked else None
    try:
        right = with_gradients(plain_cosine_sim_attention, {n: t.double() for n, t in low.items()}, mask, causal)
        ours = with_gradients(
            lambda **options: flash_cosine_sim_attention(**options, backend=backend),
            {name: tensor.to(device) for name, tensor in low.items()},
            mask if mask is None else mask.to(device),
            causal,
        )
        for name, theirs in right.items():
            difference = ours[name].double().cpu() - theirs
            found["errors"][name] = (difference.square().mean() / theirs.square().mean()).sqrt().item()
    except Exception as error:  # whatever a driver, a compiler or a library raises is what this is to find
        found["error"] = f"{type(error).__name__}: {first_line(error)}"
    limits = {name: LIMITS[dtype] * (1 if name == "o" else 2) for name in found["errors"]}
    found["right"] = found["error"] is None and all(
        error <= limits[name]
        for name, error in found["errors"].items()  # NaN is not
    )
    return found


def with_gradients(
    attend: Callable[..., Tensor], tensors: dict[str, Tensor], mask: Tensor | None, causal: bool
) -> dict[str, Tensor]:
    """The output, o, and the gradients of all tensors of sum(o * weights), by name."""
    tensors = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    o = attend(**tensors, mask=mask, causal=causal)
    weights = torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).to(o)
    grads = torch.autograd.grad((o * weights).sum(), list(tensors.values()))
    return {"o": o.detach(), **{f"d{name}": grad for name, grad in zip(tensors, grads, strict=True)}}


def time_all(problems: list[Problem]) -> list[Report]:
    """The times by head dim; what goes wrong joins the problems."""
    found = []
    try:
        for head_dim in SPEED_HEAD_DIMS:
            found.append(time_one(head_dim))
    except RuntimeError as error:  # CUDA's errors are
        said = first_line(error)
        problems.append(problem(f"nothing could be timed: {said}", cure_of(said, "run this again, with the GPU idle")))
    return found


def time_one(head_dim: int) -> Report:
    """Forward + backward in bfloat16, causal, on the first GPU: ms of one call, and of SDPA with and without norms."""
    shape = SPEED_SHAPE["batch"], SPEED_SHAPE["num_heads"], SPEED_SHAPE["seq_len"], head_dim
    q, k, v, do = torch.randn(4, *shape, device="cuda", dtype=torch.bfloat16).unbind(0)
    tensors = [tensor.detach().requires_grad_() for tensor in (q, k, v)]

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    contenders = {
        "ours_ms": lambda q, k, v: flash_cosine_sim_attention(q, k, v, causal=True, backend="cuda"),
        "sdpa_ms": sdpa,
        "norms_and_sdpa_ms": lambda q, k, v: sdpa(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v),
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(13):  # in turns; the first three warm up
        for name, attend in contenders.items():
            elapsed_ms = timed(attend, tensors, do)
            if turn >= 3:
                times[name].append(elapsed_ms)
    medians = {name: round(statistics.median(measured), 4) for name, measured in times.items()}
    return {"dtype": "bfloat16", "causal": True, **SPEED_SHAPE, "head_dim": head_dim, **medians}


def timed(attend: Callable[..., Tensor], tensors: list[Tensor], do: Tensor) -> float:
    """Milliseconds of forward + backward on the GPU."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    start.record()
    torch.autograd.grad(attend(*tensors), tensors, do)
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


if __name__ == "__main__":
    sys.exit(main())
