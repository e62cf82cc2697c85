"""What the device decides: precision, whether the model is compiled, and the peak that its speed is measured by."""

import logging
import os
import shutil

import torch

PRECISIONS = ("32-true", "bf16-mixed")
# Dense bf16 tensor-core peaks in FLOP/s, with float32 sums, by the very name that torch.cuda.get_device_name gives:
# a variant of the same silicon (PCIe, NVL, Ti, D, Laptop) has other clocks or units, so a part of a name will not do.
# From NVIDIA's data sheets, whose figure with sparsity is twice that without: of H100, H200, H20, GH200, HGX B200,
# HGX B300 and GB200 NVL72 (a GPU's share), A100, A800, A40, A30, A10, L40S, L40, L4 and RTX A6000; of GeForce from the
# architectures' white papers. The RTX PRO 6000's gives its AI TOPS, FP4 with sparsity: 8 times dense bf16. H800 and
# A800 have the H100's and the A100's units and slower links.
PEAK_BF16_FLOPS = {
    "NVIDIA GB300": 2500e12,
    "NVIDIA GB200": 2500e12,
    "NVIDIA B300 SXM6 AC": 2250e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GH200 480GB": 989e12,
    "NVIDIA GH200 144G HBM3e": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H800": 989e12,
    "NVIDIA H800 PCIe": 756e12,
    "NVIDIA H20": 148e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A800-SXM4-80GB": 312e12,
    "NVIDIA A800 80GB PCIe": 312e12,
    "NVIDIA A40": 149.7e12,
    "NVIDIA A30": 165e12,
    "NVIDIA A10": 125e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L40": 181e12,
    "NVIDIA L4": 121e12,
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": 500e12,
    "NVIDIA RTX PRO 6000 Blackwell Server Edition": 500e12,
    "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition": 439e12,
    "NVIDIA RTX A6000": 154.8e12,
    "NVIDIA GeForce RTX 5090": 209.5e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
    "NVIDIA GeForce RTX 3090": 71e12,
}

log = logging.getLogger(__name__)


def uses_cuda(accelerator: str) -> bool:
    """Whether training will run on a GPU."""
    if accelerator not in ("auto", "cpu", "gpu"):
        raise ValueError(f"trainer.accelerator must be auto, cpu or gpu, got {accelerator!r}")
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise ValueError("trainer.accelerator=gpu needs a CUDA device, and PyTorch sees none")
    return accelerator != "cpu" and torch.cuda.is_available()


def choose_precision(precision: str | None, *, cuda: bool) -> str:
    """Lightning's name of the precision: bf16 autocast over float32 weights on a GPU, float32 on a CPU."""
    if precision is None:
        return "bf16-mixed" if cuda else "32-true"
    if precision not in PRECISIONS:
        # fp16 would need its gradients unscaled before they are clipped and logged
        raise ValueError(f"trainer.precision must be null or one of {PRECISIONS}, got {precision!r}")
    return precision


def compiles_by_default(*, cuda: bool) -> bool:
    """Whether compile=null means true: torch.compile pays on a GPU, and needs a C compiler to build its launchers."""
    if not cuda:
        return False
    found = os.environ.get("CC") or any(shutil.which(compiler) for compiler in ("cc", "gcc", "clang"))
    if not found:
        log.warning("compile=null: no C compiler was found (cc, gcc, clang, CC), so the model is not compiled")
    return bool(found)


def choose_compile(compiled: bool | None, *, cuda: bool) -> bool:
    """Whether the model is compiled: as the key ``compile`` says, null being ``compiles_by_default``."""
    return compiles_by_default(cuda=cuda) if compiled is None else compiled


def wait_for(device: torch.device) -> None:
    """Until a device has done all that was launched; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def is_of_compiling(error: BaseException) -> bool:
    """Whether torch.compile raised it: told by a name, for what has the class takes seconds to import."""
    return any(base.__name__ == "TorchDynamoException" for base in type(error).__mro__)


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 peak in FLOP/s, or None when it is not known (and for a CPU)."""
    return PEAK_BF16_FLOPS.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
