"""Compiles the sources of csrc/ for the CPU, with the emulator in place of nvcc, ptx.cuh, wgmma.cuh and a GPU."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

EMULATOR = Path(__file__).resolve().parent
ROOT = EMULATOR.parents[1]
CSRC = ROOT / "kernels" / "flash_cosine_sim_attention" / "csrc"

# Those with asm, which have a counterpart here, and what else that needs.
REPLACED = ("common/ptx.cuh", "sm90/wgmma.cuh")
ADDED = ("emulator.h", "products.cpp", "runtime.cpp")
# What csrc/ writes and no host compiler reads; sources may have it anywhere.
SYNTAX = [
    (r"([\w:]+(?:<[\w, ]+>)?)\s*<<<(.*?)>>>", r"emulator::Launch{\1, \2}"),
    (r"extern __shared__ (?:__align__\(\d+\) )?(\w+) (\w+)\[\];", r"\1* \2 = reinterpret_cast<\1*>(emulator::shared);"),
]
# binding.cpp serves the CPU's dispatch key; each of these must be there.
BINDING = {
    "IMPL(flash_cosine_sim_attention, CUDA, m)": "IMPL(flash_cosine_sim_attention, CPU, m)",
    "torch::stable::accelerator::DeviceGuard guard_;": "int guard_;",
    "q.get_device_index()": "0",
    "aoti_torch_device_type_cuda()": "aoti_torch_device_type_cpu()",
    "(aoti_torch_get_current_cuda_stream(": "(emulated_current_stream(",
    "(aoti_torch_empty_strided(": "(emulated_empty_strided(",
    "namespace flash_cosine_sim {\n": """
extern "C" AOTITorchError emulated_current_stream(int32_t, void**);
extern "C" AOTITorchError emulated_empty_strided(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t,
                                                 AtenTensorHandle*);
namespace flash_cosine_sim {
""",
}


def rewrite(name: str, text: str) -> str:
    for pattern, replacement in SYNTAX:
        text = re.sub(pattern, replacement, text, flags=re.DOTALL)
    assert "<<<" not in text and "extern __shared__" not in text, f"{name} has CUDA syntax that {__file__} must learn"
    if name == "binding.cpp":
        for old, new in BINDING.items():
            assert text.count(old) == 1, f"binding.cpp no longer has one {old!r}, which {__file__} replaces"
            text = text.replace(old, new)
    return text


def build(folder: Path, nvcc: str, csrc: Path = CSRC) -> Path:
    """Compile, in `folder`, the library that registers the emulated kernels for CPU tensors."""
    for source in csrc.rglob("*.*"):
        if source.suffix in (".cu", ".cuh", ".cpp", ".h"):
            target = folder / source.relative_to(csrc)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(rewrite(source.name, source.read_text()))
    load_setup().write_instantiations(csrc, folder)
    for name in (*REPLACED, *ADDED):
        shutil.copy(EMULATOR / Path(name).name, folder / name)
    torch_folder = Path(torch.__file__).parent
    # nvcc only calls the host compiler, and knows where CUDA's headers are.
    compile_command = [nvcc, *"-x c++ -std=c++20 -O1".split()]
    compile_command += ["-DUSE_CUDA", "-DFLASH_COSINE_SIM_HAS_SM90=1"]
    # The kernels read the bits of one type as another's, as nvcc lets them; and with its checks glibc takes a longjmp
    # to another stack for an error.
    compile_command += ["-Xcompiler", "-fPIC,-fvisibility=hidden,-fno-strict-aliasing,-U_FORTIFY_SOURCE"]
    compile_command += ["-Xcompiler", "-Wno-unknown-pragmas"]
    # It runs where it is compiled. No host fuses what another does not: products are rounded before they are added.
    compile_command += ["-Xcompiler", "-march=native,-ffp-contract=off"]
    compile_command += [f"-I{folder}", "-isystem", str(torch_folder / "include"), "-c"]
    # Read by every source, so once for all: gcc takes a header that it compiled before by the same flags.
    header = folder / "emulator.h"
    run([*compile_command, "-Xcompiler", "-x,c++-header", header, "-o", f"{header}.gch"])
    compile_command += ["-include", "emulator.h"]
    sources = sorted((*folder.rglob("*.cu"), *folder.rglob("*.cpp")))
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(lambda source: run([*compile_command, source, "-o", f"{source}.o"]), sources))
    library = folder / "emulated.so"
    link_command = [nvcc, "-shared", "-cudart", "none", "-o", library, *(f"{source}.o" for source in sources)]
    # Fails here, with a name, where csrc/ calls something of CUDA that runtime.cpp lacks.
    run([*link_command, f"-L{torch_folder / 'lib'}", "-Xlinker", "-z,defs,--no-as-needed", "-ltorch_cpu", "-ltorch"])
    return library


def load_setup():
    """setup.py as a module."""
    spec = importlib.util.spec_from_file_location("setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def run(command: list) -> None:
    command = [str(word) for word in command]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, f"{shlex.join(command)}\n{result.stderr}"
