"""The CUDA library of csrc/, built by setup.py for its default targets, on a machine that may have no GPU.

No compiler may warn, no kernel spill registers or wait for what wgmma was to overlap, and the library loads.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from test_packaging import (
    PACKAGE,
    ROOT,
    assert_only_the_stable_abi,
    build_environment,
    build_in_place,
    compiling_environment,
    copy_sources,
    device_code,
    needs_nvcc,
    run_python,
)

# The tests share one build of about three minutes, hence one worker: `make test` has pytest-xdist heed the group.
pytestmark = [needs_nvcc, pytest.mark.xdist_group("compile")]

SPILLING_CU = """
__global__ void __launch_bounds__(1024, 2) spilling_kernel(float* x) {
  float values[64];
  for (int i = 0; i < 64; ++i) values[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
  for (int i = 0; i < 64; ++i) x[i * 1024 + threadIdx.x] = values[63 - i] * values[(i * 7) % 64];
}
void launch_spilling(float* x) {
  int unused = 0;
  spilling_kernel<<<1, 1024>>>(x);
}
"""

# Each product needs the one before it: ptxas reports that it serialises them.
SERIALISED_SM90_CU = """
__global__ void serialised_kernel(float* x, unsigned long long a, unsigned long long b) {
  float d[4] = {x[0], x[1], x[2], x[3]};
  for (int i = 0; i < 4; ++i) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, %4, %5, 1, 1, 1, 0, 0;"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(a), "l"(b));
    d[0] += 1;
  }
  for (int i = 0; i < 4; ++i) x[i] = d[i];
}
"""

LOAD = """
import torch
from flash_cosine_sim_attention import flash_cosine_sim_attention, ops
assert ops.kernels_available(), ops.kernels_error()
q = torch.randn(1, 2, 5, 16)
assert flash_cosine_sim_attention(q, q, q).shape == q.shape
"""


def compile_tree(tree: Path) -> str:
    """Compile the tree's csrc/ for 8.0 and 9.0a; returns all that the compilers said."""
    # nvcc itself reads this variable: setup.py's flags stay as they are, and users see none of the statistics.
    result = build_in_place(tree, compiling_environment("8.0;9.0a", NVCC_APPEND_FLAGS="-Xptxas -v"))
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def complaints(output: str) -> list[str]:
    """Warnings, what ptxas reports of wgmma (C75xx, which it calls info), and the functions that spill."""
    found = [line for line in output.splitlines() if re.search(r"\bwarning\b|\bC75\d\d\b", line, re.IGNORECASE)]
    spills = r"Function properties for (\S+)\s+\d+ bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    functions = re.findall(spills, output)
    assert functions and len(functions) == output.count("bytes spill stores"), "ptxas -v prints something new"
    found += [
        f"{demangled(name)} spills registers: {stored} bytes stored, {loaded} loaded"
        for name, stored, loaded in functions
        if (stored, loaded) != ("0", "0")
    ]
    return found


def demangled(name: str) -> str:
    return subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """(all that the compilers said, the tree they built in place)."""
    tree = copy_sources(tmp_path_factory.mktemp("compile") / "tree")
    csrc = Path("kernels", PACKAGE, "csrc")
    shutil.copytree(ROOT / csrc, tree / csrc)
    return compile_tree(tree), tree


def test_complaints_are_found(tmp_path):
    csrc = {"spilling.cu": SPILLING_CU, "serialised_sm90.cu": SERIALISED_SM90_CU}
    found = "\n".join(complaints(compile_tree(copy_sources(tmp_path / "tree", csrc=csrc))))
    assert 'warning #177-D: variable "unused"' in found
    assert re.search(r"spilling_kernel\(float\*\) spills registers: \d+ bytes stored, \d+ loaded", found)
    assert re.search(r"\(C75\d\d\) Potential Performance Loss: .*serialised_kernel", found)


def test_no_kernel_spills_and_no_compiler_warns(build):
    found = complaints(build[0])
    assert not found, "\n".join(found)


def test_library_loads_without_a_gpu(build):
    tree = build[1]
    (library,) = (tree / "kernels" / PACKAGE).glob("_C*.so")
    assert_only_the_stable_abi(library)
    assert set(device_code(library)) == {("code", 80), ("code", 90)}
    result = run_python("-c", LOAD, cwd=tree, env=build_environment(PYTHONPATH=str(tree / "kernels")))
    assert result.returncode == 0, result.stderr
