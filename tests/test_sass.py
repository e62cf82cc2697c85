"""sass.py, which compares two builds' machine code, on listings as cuobjdump prints them."""

import shutil

import pytest
import sass

LISTING = """
Fatbin elf code:
================
arch = sm_80
identifier = /one/folder/dq.cu

\t\tFunction : {name}
\t.headerflags\t@"EF_CUDA_SM80"
        /*0000*/                   MOV R1, c[0x0][0x28] ;        /* 0x00000a00ff017b82 */
                                                                 /* 0x000fe20000000800 */
        /*0010*/                   {second} ;                    /* 0x0000000000007919 */
\t\t..........

Fatbin elf code:
================
arch = sm_90a
identifier = /one/folder/dq.cu

\t\tFunction : {name}
        /*0000*/                   EXIT ;                        /* 0x000000000000794d */
\t\t..........
"""
USAGE = """
Fatbin elf code:
================
arch = sm_80

Resource usage:
 Common:
  GLOBAL:0
 Function {name}:
  REG:{registers} STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:560 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
# dq_kernel<float, false>(BackwardParams) in two namespaces, the second of a file's own.
NAME = "_ZN16flash_cosine_sim12_GLOBAL__N_19dq_kernelIfLb0EEEvNS_14BackwardParamsE"
OTHER_NAME = "_ZN5other12_GLOBAL__N_19dq_kernelIfLb0EEEvNS_14BackwardParamsE"

pytestmark = pytest.mark.skipif(shutil.which("c++filt") is None, reason="no c++filt on PATH")


@pytest.fixture
def kernels(monkeypatch):
    def make(name=NAME, second="S2R R0, SR_CTAID.X", registers=40):
        texts = {"-sass": LISTING, "-res-usage": USAGE}
        listing = {option: text.format(name=name, second=second, registers=registers) for option, text in texts.items()}
        monkeypatch.setattr(sass, "cuobjdump", lambda option, _: listing[option])
        return sass.kernels_of("library.so")

    return make


def test_kernels_are_matched_by_architecture_and_name_without_namespaces(kernels):
    before = kernels()
    assert set(before) == {"sm_80 dq_kernel<float, false>", "sm_90a dq_kernel<float, false>"}
    assert sass.differences(before, kernels(OTHER_NAME)) == []


@pytest.mark.parametrize("change", [{"second": "S2R R2, SR_CTAID.X"}, {"registers": 41}])
def test_another_instruction_and_another_register_count_are_differences(kernels, change):
    (found,) = sass.differences(kernels(), kernels(**change))
    assert found.startswith("sm_80 dq_kernel<float, false>: 4 and 4 lines, which differ from line")


def test_a_kernel_that_one_build_lacks_is_a_difference(kernels):
    before, after = kernels(), kernels(NAME.replace("9dq_kernel", "9dk_kernel"))
    assert sass.differences(before, after) == [
        "sm_80 dq_kernel<float, false>: only before",
        "sm_90a dq_kernel<float, false>: only before",
        "sm_80 dk_kernel<float, false>: only after",
        "sm_90a dk_kernel<float, false>: only after",
    ]


def test_names_lose_namespaces_return_types_and_parameters():
    name = "void a::(anonymous namespace)::kernel<(a::Math)1, 64, (a::f(int))>(a::Params, unsigned int (*)(b::C))"
    assert sass.bare(name) == "kernel<(Math)1, 64, (f(int))>"
