"""The sources that setup.py writes: the kernel templates of csrc/, instantiated."""

import os
import re
from pathlib import Path

import pytest
from emulator.build import CSRC, load_setup

setup = load_setup()


def write(csrc, folder):
    return {path.relative_to(folder).as_posix(): path.read_text() for path in setup.write_instantiations(csrc, folder)}


def test_every_template_that_attention_h_declares_is_instantiated(tmp_path):
    declared = re.findall(
        r"template <Math kMath, int kHeadDim(?:, Variant kVariant|, bool kEightWarps)?>.*\n"
        r"void (\w+)\(const (\w+)& params, cudaStream_t stream\);",
        (CSRC / "attention.h").read_text(),
    )
    assert sorted(declared) == sorted((kernel.launch, kernel.parameters) for kernel in setup.INSTANTIATIONS)
    sources = write(CSRC, tmp_path)
    for kernel in setup.INSTANTIATIONS:
        assert f"void {kernel.launch}(" in (CSRC / f"{kernel.header}.cuh").read_text()
        for math in kernel.maths:
            assert f'#include "{kernel.header}.cuh"\n' in sources[f"{kernel.header}_{math}.cu"]


def test_an_instance_is_written_once(tmp_path):
    instances = re.findall(r"^template void (.+?)\(", "".join(write(CSRC, tmp_path).values()), re.MULTILINE)
    assert len(instances) == len(set(instances)) == 163
    assert {instance for instance in instances if "forward_split" in instance and ", 256>" in instance} == {
        f"launch_forward_split_sm80<Math::{math}, 256>" for math in ("kBf16", "kFp16", "kFp16WideP")
    }


def included(path):
    """The headers of csrc/ that a source includes, directly or not."""
    found, left = set(), [path]
    while left:
        for name in re.findall(r'^#include "(.+?)"', left.pop().read_text(), re.MULTILINE):
            if name not in found and (CSRC / name).exists():
                found.add(name)
                left.append(CSRC / name)
    return found


def test_another_tile_size_compiles_its_kernel_alone(tmp_path):
    sources = {path.relative_to(CSRC).as_posix(): path for path in setup.kernel_sources()}
    sources |= {path.relative_to(tmp_path).as_posix(): path for path in setup.write_instantiations(CSRC, tmp_path)}
    headers = {name: included(path) for name, path in sources.items()}
    tables = sorted(path.relative_to(CSRC).as_posix() for path in CSRC.glob("sm*/tiles/*.h"))
    assert tables == sorted(f"{kernel.header.replace('/', '/tiles/')}.h" for kernel in setup.INSTANTIATIONS)
    for kernel in setup.INSTANTIATIONS:
        table = f"{kernel.header.replace('/', '/tiles/')}.h"
        assert {name for name, used in headers.items() if table in used} == {"plan.cpp", *kernel.sources()}, table


def test_a_source_is_written_anew_only_if_its_text_changes(tmp_path):
    before = write(CSRC, tmp_path)
    first, second = (tmp_path / name for name in list(before)[:2])
    for path in (first, second):
        os.utime(path, (0, 0))
    second.write_text("something else")
    os.utime(second, (0, 0))
    assert write(CSRC, tmp_path) == before
    assert first.stat().st_mtime == 0 and second.stat().st_mtime > 0


def test_a_tree_without_a_header_has_no_instances_of_it(tmp_path):
    (tmp_path / "csrc" / "sm90").mkdir(parents=True)
    (tmp_path / "csrc" / "sm90" / "forward.cuh").touch()
    assert list(write(tmp_path / "csrc", tmp_path / "build")) == [
        f"sm90/forward_{name}.cu" for name in ("bf16", "bf16_banded", "bf16_scored", "fp16", "fp16_banded")
    ]


@pytest.mark.parametrize("path, expected", [("sm90/a.cu", True), ("sm80/a.cu", False), ("a_sm90.cu", False)])
def test_the_folder_says_the_target(path, expected):
    assert setup.is_for_sm90(CSRC / Path(path)) is expected


def test_documents_say_how_many_files_are_compiled(tmp_path):
    written = setup.write_instantiations(CSRC, tmp_path)
    total = len(written) + len(setup.kernel_sources()) + 1  # the schemas
    portable = total - sum(path.parent.name == "sm90" for path in written)
    docs = Path(__file__).parent.parent / "docs"
    assert f"\n{total} files, {portable} of them not Hopper's" in (docs / "design" / "overview.md").read_text()
    assert f"Of the library's {total} files" in (docs / "adding.md").read_text()
