"""What doctor.py found, in lines of 80 columns of ASCII."""

import math
import textwrap
from typing import Any

WIDTH = 80

Report = dict[str, Any]
Problem = dict[str, str]  # why, cure

VERDICTS = {
    0: "The CUDA kernels serve, and are right.",
    1: "The CUDA kernels do not serve here; backend='auto' computes by PyTorch's SDPA, and is right.",
    3: "Something computes wrong results or fails: see above.",
}


def rendered(report: Report) -> list[str]:
    cuda = report["cuda_of_torch"]
    lines = [
        *line("flash_cosine_sim_attention", report["flash_cosine_sim_attention"]),
        *line("torch", f"{report['torch']} ({f'CUDA {cuda}' if cuda else 'not a CUDA build'})"),
        *line("Python, system", f"{report['python']}, {report['system']}"),
        *line("NVIDIA driver", report["driver"] or "none that answers"),
    ]
    for index, gpu in enumerate(report["gpus"]):
        lines += line(f"GPU {index}", "{name}, compute capability {0}.{1}".format(*gpu["capability"], **gpu))
    library = report["library"]
    compiled = [*library["architectures"], *(f"PTX {ptx}" for ptx in library["ptx"])]
    lines += line("compiled kernels", f"for {', '.join(compiled)}" if compiled else library["file"] or "none")
    lines += ["", *(rendered_kernels(report["kernels"]) if report["serves"] else rendered_fallback(report))]
    if report["serves"] and report["long_calls_by"] == "sdpa":
        by_sdpa = (
            "On this GPU backend='auto' takes SDPA for long 16-bit calls of head dim 128 or less without mask, bias or "
            "window, which should be faster."
        )
        lines += wrapped(by_sdpa + " Below, one call is of backend='cuda'." * bool(report["speed"]), indent=2)
    lines += ["", *rendered_self_test(report["self_test"])]
    lines += rendered_speed(report["speed"])
    for found in report["problems"]:
        lines += ["", *wrapped(f"Why not: {found['why']}"), *wrapped(f"Cure: {found['cure']}")]
    return [*lines, "", *wrapped(VERDICTS[report["exit_status"]])]


def rendered_kernels(kernels: list[Report]) -> list[str]:
    lines = ["Kernels            head dims   forward, backward"]
    for dtype in dict.fromkeys(one["dtype"] for one in kernels):
        for direction in ("forward", "backward"):
            own = [one for one in kernels if (one["dtype"], one["direction"]) == (dtype, direction)]
            for one in own:
                first, last = one["head_dims"]
                lines.append(f"  {dtype:15}  {first:3} to {last:3}  {direction:8} {one['kernels']}")
    if any(one["kernels"] == "Hopper" for one in kernels):
        lines += wrapped("With a bias, and backward with l2norm_qk=False, the portable ones serve.", indent=2)
    return lines


def rendered_fallback(report: Report) -> list[str]:
    where = "the GPU" if report["gpus"] else "the CPU"
    return wrapped(f"Kernels: none serve. backend='auto' is PyTorch's SDPA, on {where}, in every dtype.")


def rendered_self_test(self_test: list[Report]) -> list[str]:
    lines = [f"Self-test, backend='{self_test[0]['backend']}', relative RMS error against float64"]
    for dtype in dict.fromkeys(one["dtype"] for one in self_test):
        own = [one for one in self_test if one["dtype"] == dtype]
        errors = [one["errors"] for one in own if one["error"] is None]
        o = largest([one["o"] for one in errors])
        grads = largest([error for one in errors for name, error in one.items() if name != "o"])
        right = sum(one["right"] for one in own)
        lines.append(f"  {dtype:15}  output {o:.1e}  gradients {grads:.1e}  {right} of {len(own)} right")
    return lines


def largest(errors: list[float]) -> float:
    """nan if one is, which max() passes over unless it is the first, or if there are none."""
    return math.nan if not errors or any(map(math.isnan, errors)) else max(errors)


def rendered_speed(speed: list[Report]) -> list[str]:
    if not speed:
        return []
    sizes = "{batch} x {num_heads} heads x {seq_len}".format(**speed[0])
    lines = ["", f"Forward + backward, bfloat16, causal, {sizes}: ms"]
    lines.append("  head dim    one call    SDPA, no norm    norms + SDPA")
    for one in speed:
        times = f"{one['ours_ms']:8.3f}    {one['sdpa_ms']:13.3f}    {one['norms_and_sdpa_ms']:12.3f}"
        lines.append(f"  {one['head_dim']:8}    {times}")
    return lines


def line(name: str, value: str) -> list[str]:
    return textwrap.wrap(f"{name:28}{value}", WIDTH, subsequent_indent=" " * 28)


def wrapped(text: str, indent: int = 0) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=" " * indent, subsequent_indent=" " * (indent + 2))
