"""The CUDA library of csrc/, built by setup.py on a machine that may have no GPU.

No compiler may warn, no kernel spill registers, wait for what wgmma was to overlap or have operands of wgmma in the
wrong registers, and the library loads.
"""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from emulator.build import CSRC, load_setup
from support import ROOT
from support.building import (
    PACKAGE,
    assert_only_the_stable_abi,
    build_environment,
    build_in_place,
    compiling_environment,
    copy_sources,
    device_code,
    run_python,
    skip_without_nvcc,
)

pytestmark = [pytest.mark.nvcc, skip_without_nvcc]

CUDA_HOME = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")


def find_cuobjdump():
    """That of CUDA's toolkit, or that of the package nvidia-cuda-cuobjdump, which belongs to no PATH; or None."""
    found = shutil.which("cuobjdump", path=f"{CUDA_HOME}/bin" if CUDA_HOME else None)
    try:
        files = importlib.metadata.files("nvidia-cuda-cuobjdump") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    return found or next((str(file.locate()) for file in files if file.name == "cuobjdump"), None)


CUOBJDUMP = find_cuobjdump()

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

# As cuobjdump prints it: q is kept in R100 to R103, and P is made in the same registers or others.
SASS = """
		Function : kept_apart
        /*0010*/                   LDSM.16.M88.4 R100, [R2] ;
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R24, R100, gdesc[UR8], RZ, !UPT, gsb0 ;
        /*0030*/                   F2FP.BF16.F32.PACK_AB R{p}, R25, R24 ;
        /*0040*/                   HGMMA.64x64x16.F32.BF16 R56, R{p}, gdesc[UR12].tnspB, R56, gsb0 ;
        /*0050*/              @!P1 BRA 0x20 ;
        /*0060*/                   HGMMA.64x64x16.F32.BF16 R56, R100, gdesc[UR12].tnspB, R56, gsb0 ;
        /*0070*/              @!P2 BRA 0x10 ;
        /*0080*/                   EXIT ;
"""

LOAD = """
import torch
from flash_cosine_sim_attention import flash_cosine_sim_attention, ops
assert ops.kernels_available(), ops.kernels_error()
q = torch.randn(1, 2, 5, 16)
assert flash_cosine_sim_attention(q, q, q).shape == q.shape
"""


# The least that has every kernel. Before a release: TORCH_CUDA_ARCH_LIST="8.0;9.0a;10.0;12.0" make emulate
TARGETS = os.environ.get("TORCH_CUDA_ARCH_LIST", "9.0a")


def compile_tree(tree: Path, targets: str = TARGETS) -> str:
    """Compile the tree's csrc/ for its targets; returns all that the compilers said."""
    # nvcc itself reads this variable: setup.py's flags stay as they are, and users see none of the statistics.
    result = build_in_place(tree, compiling_environment(targets, NVCC_APPEND_FLAGS="-Xptxas -v"))
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


def shared_a_registers(sass: str) -> dict[str, set[int] | None]:
    """By function: the registers from which both q k^T and P V take their operand a, in loops; None without a loop.

    q k^T finds q there, from one step of a loop to the next, and P V, the one whose other operand is transposed, the P
    of this step. ptxas is known to have given both the same registers, without a word: q was lost. Beyond the loops,
    where q is no longer needed, it may.
    """
    found = {}
    for text in sass.split("Function : ")[1:]:
        lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?) *;", text, re.MULTILINE)
        products, loops = [], []
        for address, line in ((int(address, 16), line) for address, line in lines):
            if product := re.match(r"HGMMA\S* R\d+, R(\d+),", line):
                registers = set(range(int(product[1]), int(product[1]) + 4))
                products.append((address, ".tnspB" in line, registers))
            # Without a condition it is not a loop's end but that of a wait, which ptxas puts behind everything else.
            if (branch := re.match(r"@.*\bBRA\b.* 0x([0-9a-f]+)$", line)) and int(branch[1], 16) < address:
                loops.append((int(branch[1], 16), address))

        def operands(transposed, start, end, products=products):
            inside = (found for address, is_pv, found in products if is_pv == transposed and start <= address <= end)
            return set().union(*inside)

        if not all(operands(transposed, 0, 1 << 32) for transposed in (False, True)):
            continue
        loops = [loop for loop in loops if operands(False, *loop) and operands(True, *loop)]
        innermost = [
            (start, end)
            for start, end in loops
            if not any(start <= other[0] and other[1] <= end and other != (start, end) for other in loops)
        ]
        shared = [operands(False, *loop) & operands(True, *loop) for loop in innermost]
        found[text.split(maxsplit=1)[0]] = set().union(*shared) if shared else None
    return found


def touched_in_flight(sass: str) -> dict[str, list[str]]:
    """By function: the instructions that touch an accumulator, or write an operand a, of a wgmma before its wait.

    In the order of the listing, as if no branch were taken: what a loop's end leaves under way for its beginning is not
    seen.
    """
    found = {}
    for text in sass.split("Function : ")[1:]:
        touching, groups, group = [], [], []  # groups: of wgmmas, each of (accumulators, operand a)
        for line in re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?) *;", text, re.MULTILINE):
            line = re.sub(r"^@!?U?P\w+ +", "", line)
            if product := re.match(r"HGMMA\.64x(\d+)x\S+ R(\d+), (?:R(\d+)|gdesc)", line):
                first = int(product[2])
                operand = set(range(int(product[3]), int(product[3]) + 4)) if product[3] else set()
                group.append((set(range(first, first + int(product[1]) // 2)), operand))
                if "gsb0" in line:
                    groups.append(group)
                    group = []
            elif wait := re.match(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d+)", line):
                groups = groups[max(len(groups) - int(wait[1]), 0) :]
            else:
                used = {int(register) for register in re.findall(r"\bR(\d+)\b", line)}
                target = re.match(r"(?!ST|RED|ATOM|BAR|SYNCS|R2UR)\S+ R(\d+)\b", line)
                written = {int(target[1])} if target else set()
                if any(used & sums or written & a for one in [*groups, group] for sums, a in one):
                    touching.append(line)
        if "HGMMA" in text:
            found[text.split(maxsplit=1)[0]] = touching
    return found


def demangled(name: str) -> str:
    return subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture(scope="module")
def build(make_once):
    """(all that the compilers said, the tree they built in place): minutes."""

    def make(folder):
        tree = copy_sources(folder / "tree")
        csrc = Path("kernels", PACKAGE, "csrc")
        shutil.copytree(ROOT / csrc, tree / csrc)
        (folder / "output.txt").write_text(compile_tree(tree))

    folder = make_once("compile", make)
    return (folder / "output.txt").read_text(), folder / "tree"


def test_complaints_are_found(tmp_path):
    csrc = {"spilling.cu": SPILLING_CU, "sm90/serialised.cu": SERIALISED_SM90_CU}
    found = "\n".join(complaints(compile_tree(copy_sources(tmp_path / "tree", csrc=csrc))))
    assert 'warning #177-D: variable "unused"' in found
    assert re.search(r"spilling_kernel\(float\*\) spills registers: \d+ bytes stored, \d+ loaded", found)
    assert re.search(r"\(C75\d\d\) Potential Performance Loss: .*serialised_kernel", found)


def test_no_kernel_spills_and_no_compiler_warns(build):
    found = complaints(build[0])
    assert not found, "\n".join(found)


def test_files_of_sm90_are_compiled_for_it(build):
    kernels = set(re.findall(r"Compiling entry function '(\S*sm90\S*)' for '(\w+)'", build[0]))
    assert {target for _, target in kernels} == {"sm_90a"}
    objects = {path.name.removesuffix(".o") for path in (build[1] / "build" / "kernels" / "sm90").glob("*.cu.o")}
    units = {name for kernel in load_setup().INSTANTIATIONS for name in kernel.sources()}
    assert objects and {f"sm90/{name}" for name in objects} == {name for name in units if name.startswith("sm90/")}


def test_another_tile_size_compiles_few_files(build):
    """A table is read by its own kernel's files and plan.cpp."""
    folder = build[1] / "build" / "kernels"
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    ninja = shutil.which("ninja", path=path)
    listing = subprocess.run([ninja, "-C", folder, "-t", "deps"], capture_output=True, text=True, check=True).stdout
    units = re.findall(r"^(\S+): #deps.*\n((?: .*\n)+)", listing, re.MULTILINE)
    assert len(units) == len(list(folder.rglob("*.o")))
    tables = {path.relative_to(CSRC).as_posix() for path in CSRC.glob("sm?0/tiles/*.h")}
    assert len(tables) == 6
    for table in tables:
        readers = {name for name, headers in units if f"/{table}\n" in headers}
        kernel = table.replace("/tiles/", "/").removesuffix(".h")
        own = {f"{name}.o" for one in load_setup().INSTANTIATIONS if one.header == kernel for name in one.sources()}
        assert readers == {"plan.cpp.o", *own} and 1 < len(readers) <= 8, (table, readers)


def test_shared_a_registers_are_found():
    assert shared_a_registers(SASS.replace("{p}", "120")) == {"kept_apart": set()}
    assert shared_a_registers(SASS.replace("{p}", "102")) == {"kept_apart": {102, 103}}


def test_registers_touched_in_flight_are_found():
    product = "HGMMA.64x16x16.F32.BF16 R24, {a}, gdesc[UR8], R24, gsb0"
    for lines, touching in [
        ([product.format(a="R100"), "WARPGROUP.DEPBAR.LE gsb0, 0x0", "FADD R24, R31, R31", "MOV R100, RZ"], []),
        ([product.format(a="R100"), "MOV R101, RZ", "FADD R1, R32, R100", "STS [R2], R103"], ["MOV R101, RZ"]),
        ([product.format(a="gdesc[UR4]"), "@P0 FADD R1, R31, R2"], ["FADD R1, R31, R2"]),
        ([product.format(a="R4"), product.format(a="R8"), "WARPGROUP.DEPBAR.LE gsb0, 0x1", "MOV R4, R8"], []),
    ]:
        listing = "\t\tFunction : kernel\n" + "".join(f"        /*{16 * i:04x}*/  {x} ;\n" for i, x in enumerate(lines))
        assert touched_in_flight(listing) == {"kernel": touching}


@pytest.mark.skipif(CUOBJDUMP is None, reason="no cuobjdump: neither CUDA's toolkit nor nvidia-cuda-cuobjdump has one")
def test_nobody_touches_the_registers_of_a_wgmma_under_way(build):
    objects = sorted((build[1] / "build" / "kernels" / "sm90").glob("*.cu.o"))
    for path in objects:
        listing = subprocess.run([CUOBJDUMP, "-sass", path], capture_output=True, text=True, check=True).stdout
        touching = touched_in_flight(listing)
        assert touching, path
        assert not any(touching.values()), {demangled(name): lines for name, lines in touching.items() if lines}
    assert objects


@pytest.mark.skipif(CUOBJDUMP is None, reason="no cuobjdump: neither CUDA's toolkit nor nvidia-cuda-cuobjdump has one")
def test_wgmma_keeps_the_registers_of_its_operands_apart(build):
    objects = sorted((build[1] / "build" / "kernels" / "sm90").glob("forward*.cu.o"))
    for path in objects:
        listing = subprocess.run([CUOBJDUMP, "-sass", path], capture_output=True, text=True, check=True).stdout
        shared = shared_a_registers(listing)
        assert shared and None not in shared.values(), f"{path.name}: shared_a_registers must learn how loops look"
        assert not any(shared.values()), {demangled(name): registers for name, registers in shared.items() if registers}
    assert objects


def test_library_loads_without_a_gpu(build):
    tree = build[1]
    (library,) = (tree / "kernels" / PACKAGE).glob("_C*.so")
    assert_only_the_stable_abi(library)
    assert set(device_code(library)) == {("code", 10 * int(a) + int(b)) for a, b in re.findall(r"(\d+)\.(\d)", TARGETS)}
    result = run_python("-c", LOAD, cwd=tree, env=build_environment(PYTHONPATH=str(tree / "kernels")))
    assert result.returncode == 0, result.stderr
