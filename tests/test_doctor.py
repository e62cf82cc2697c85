"""The doctor: what it says in each state of a machine, its exit status, and that it finds what is wrong."""

import json
import math
import os
import struct
import subprocess
import sys

import pytest
import torch
from support import ROOT

from flash_cosine_sim_attention import doctor, ops
from flash_cosine_sim_attention.doctor_text import WIDTH, rendered

SMI = [{"driver": "580.159.04", "name": "NVIDIA H200", "capability": "9.0"}]
FAT_BINARY = b"\x50\xed\x55\xba\x01\x00\x10\x00"


def library_for(code=(), ptx=(), hopper=False):
    """The bytes of a library with fat binaries of these architectures, by number: 80, 90."""
    entries = b""
    for kind, numbers in ((2, code), (1, ptx)):
        for number in numbers:
            header = struct.pack("<HHIQ12xI", kind, 0, 64, 8, number)
            entries += header.ljust(64, b"\0") + b"machine."
    binary = b"before" + FAT_BINARY + struct.pack("<Q", len(entries)) + entries
    return binary + b"sm_90a" * hopper


BOTH = library_for((80, 90), (90,), hopper=True)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """machine(...) makes this one look like another, and returns the doctor's report on it; nothing runs on a GPU."""

    def look(capability=None, cuda="13.0", smi=SMI, library=BOTH, error=None, init=None):
        gpus = [] if capability is None else [capability]
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"NVIDIA GPU {index}")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: gpus[index])
        monkeypatch.setattr(torch.cuda, "init", init or (lambda: None))
        monkeypatch.setattr(doctor, "nvidia_smi", lambda: smi)
        monkeypatch.setattr(doctor, "FOLDER", tmp_path)
        monkeypatch.setattr(doctor, "other_installations", list)
        monkeypatch.setattr(ops, "_kernels_error", error)
        if library is not None:
            (tmp_path / "_C.abi3.so").write_bytes(library)
        test_one, backends = doctor.test_one, []

        def on_the_cpu(_device, backend, *arguments):
            backends.append(backend)
            return {**test_one("cpu", "sdpa", *arguments), "backend": backend}

        monkeypatch.setattr(doctor, "test_one", on_the_cpu)
        monkeypatch.setattr(doctor, "CASES", ((16, 2, True, True, False),))
        monkeypatch.setattr(doctor, "time_one", lambda head_dim: SPEED | {"head_dim": head_dim})
        report = doctor.examine()
        assert report["exit_status"] in (0, 1, 3) and set(backends) == {"cuda" if report["serves"] else "sdpa"}
        for line in rendered(report):
            assert len(line) <= WIDTH and line.isascii(), line
        json.dumps(report)
        return report

    return look


SPEED = {"dtype": "bfloat16", "causal": True, **doctor.SPEED_SHAPE, "ours_ms": 1.25, "sdpa_ms": 1.5,
         "norms_and_sdpa_ms": 12345.678}  # fmt: skip


def only_problem(report):
    (found,) = report["problems"]
    return found["why"], found["cure"]


# Where the kernels serve


def test_hopper(machine):
    report = machine((9, 0))
    assert report["serves"] and report["exit_status"] == 0 and not report["problems"]
    assert report["library"]["architectures"] == ["8.0", "9.0a"] and report["library"]["ptx"] == ["9.0"]
    served = {(one["dtype"], one["direction"], *one["head_dims"]): one["kernels"] for one in report["kernels"]}
    for dtype in ("bfloat16", "float16"):
        assert served[dtype, "forward", 8, 256] == served[dtype, "backward", 8, 128] == "Hopper"
        assert served[dtype, "backward", 136, 256] == "portable"
    assert served["float32", "forward", 8, 256] == served["float32", "backward", 8, 256] == "portable"
    text = "\n".join(rendered(report))
    assert "bfloat16           8 to 128  backward Hopper" in text and "With a bias" in text
    assert "12345.678" in text and text.endswith("The CUDA kernels serve, and are right.")


@pytest.mark.parametrize("capability, library", [
    ((8, 0), library_for((80,))),
    ((8, 9), library_for((80,))),  # code for 8.0 runs on every later 8.x
    ((10, 3), library_for((80, 100))),
    ((12, 0), BOTH),  # by PTX
], ids=["8.0", "8.9", "10.3", "12.0"])  # fmt: skip
def test_other_gpus_run_the_portable_kernels(machine, capability, library):
    report = machine(capability, library=library)
    assert report["exit_status"] == 0 and not report["problems"]
    assert {one["kernels"] for one in report["kernels"]} == {"portable"}
    text = "\n".join(rendered(report))
    assert "With a bias" not in text
    by_sdpa = capability[0] == 10  # as backend='auto' has it
    assert report["long_calls_by"] == ("sdpa" if by_sdpa else "cuda")
    assert ("backend='auto' takes SDPA for long" in text) is by_sdpa


# Where they do not


@pytest.mark.parametrize("capability, library, why, cure", [
    ((8, 9), library_for((90,), hopper=True), "capability 8.9, the library code for 9.0a", "TORCH_CUDA_ARCH_LIST=8.9"),
    ((12, 0), library_for((80, 100)), "capability 12.0, the library code for 8.0, 10.0", "TORCH_CUDA_ARCH_LIST=12.0"),
    ((9, 0), library_for((80, 90)), "runs the portable kernels", "TORCH_CUDA_ARCH_LIST=9.0a"),
    ((7, 5), library_for((80,)), "has compute capability 7.5, and the kernels need 8.0", "none"),
], ids=["8.9", "12.0", "9.0", "7.5"])  # fmt: skip
def test_a_gpu_that_the_library_is_not_for(machine, capability, library, why, cure):
    report = machine(capability, library=library)
    found = only_problem(report)
    assert why in found[0] and cure in found[1]
    assert report["exit_status"] == (1 if capability == (7, 5) else 0)  # what fails there is the self-test


def test_no_compiled_kernels(machine):
    report = machine((9, 0), library=None, error="no compiled library in the package directory")
    why, cure = only_problem(report)
    assert why == "this package has no compiled kernels" and "pip install --no-build-isolation" in cure
    assert report["exit_status"] == 1 and report["kernels"] == report["speed"] == []
    assert "SDPA, on the GPU" in "\n".join(rendered(report))


@pytest.mark.parametrize("error", [
    "_C.abi3.so was built for another version, whose operators differ; build it again",
    "_C.abi3.so loads, but has no CUDA kernel for backward; build it again",
])  # fmt: skip
def test_kernels_of_another_version(machine, error):
    report = machine((9, 0), error=error)
    why, cure = only_problem(report)
    assert error in why and cure == "build it again, with this version's sources" and report["exit_status"] == 1


def test_a_library_that_does_not_load_is_named_without_its_folder(machine, tmp_path):
    report = machine((9, 0), error=f"_C.abi3.so does not load: {tmp_path}/_C.abi3.so: undefined symbol: aoti_torch_x")
    assert only_problem(report)[0].endswith("does not load: _C.abi3.so: undefined symbol: aoti_torch_x")
    assert str(tmp_path) not in json.dumps(report)


def raises(message):
    def init():
        raise RuntimeError(f"{message}\nand more")

    return init


@pytest.mark.parametrize("options, why, cure", [
    ({"cuda": None}, "is not a CUDA build, although there is 1 GPU (NVIDIA H200, driver 580.159.04)",
     "install a CUDA build of torch"),
    ({"cuda": None, "smi": []}, "is not a CUDA build, and no NVIDIA driver answers", "none on this machine"),
    ({"smi": [], "init": raises("Found no NVIDIA driver")}, "sees no GPU: Found no", "install the NVIDIA"),
    ({"init": raises("The NVIDIA driver on your system is too old")}, "is too old", "update the NVIDIA driver"),
    ({"init": raises("No CUDA GPUs are available")}, "No CUDA GPUs are available", "check the driver with nvidia-smi"),
])  # fmt: skip
def test_no_gpu(machine, monkeypatch, options, why, cure):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    report = machine(**options)
    found = only_problem(report)
    assert why in found[0] and cure in found[1] and "and more" not in found[0]
    assert report["exit_status"] == 1 and report["gpus"] == []


def test_a_gpu_that_is_hidden(machine, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    why, cure = only_problem(machine())
    assert why.startswith("CUDA_VISIBLE_DEVICES='' hides 1 GPU (NVIDIA H200") and cure == "unset CUDA_VISIBLE_DEVICES"


def test_a_gpu_that_a_scheduler_named_is_not_hidden(machine, monkeypatch):
    """CUDA_VISIBLE_DEVICES is set wherever a scheduler gives GPUs out; what is wrong is something else there."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    why, cure = only_problem(machine(init=raises("The NVIDIA driver on your system is too old (found version 12020)")))
    assert "driver on your system is too old" in why and "update the NVIDIA driver" in cure
    for visible in ("0", "1,0", " 1", "GPU-8932f937", "MIG-GPU-8932f937"):
        assert not doctor.hides_all(visible, 2), visible
    for visible in ("", "-1", "2", "2,0", "-1,0", "none"):
        assert doctor.hides_all(visible, 2), visible


def test_another_package_of_the_name(monkeypatch):
    monkeypatch.setattr(doctor, "warn_of_others", lambda: doctor.warnings.warn("in /home/me", stacklevel=1))
    (found,) = doctor.other_installations()
    assert "another package of this name" in found["why"] and "/home/me" not in str(found)


# What the self-test finds


@pytest.mark.parametrize("factor, right", [(1.0, True), (1.05, False), (math.nan, False)])
def test_wrong_results_are_found(machine, monkeypatch, factor, right):
    attend = doctor.flash_cosine_sim_attention
    monkeypatch.setattr(doctor, "flash_cosine_sim_attention", lambda **options: factor * attend(**options))
    report = machine((9, 0))
    assert all(one["right"] is right for one in report["self_test"])
    if right:
        assert report["exit_status"] == 0 and len(report["speed"]) == 2
        return
    why, cure = only_problem(report)
    assert why == "3 of 3 self-tests are wrong, first bfloat16, head dim 16, causal, mask"
    assert "do not train" in cure and report["exit_status"] == 3 and report["speed"] == []


def test_a_result_that_is_no_number_is_shown_and_written_as_that(machine, monkeypatch, capsys):
    attend = doctor.flash_cosine_sim_attention

    def nan_with_a_mask(*, mask, **options):
        return attend(mask=mask, **options) * (1.0 if mask is None else math.nan)

    report = machine((9, 0))
    monkeypatch.setattr(doctor, "CASES", ((16, 2, True, False, False), (16, 2, True, True, False)))
    monkeypatch.setattr(doctor, "flash_cosine_sim_attention", nan_with_a_mask)
    report = doctor.examine(speed=False)
    assert "bfloat16         output     nan  gradients     nan  1 of 2 right".split() in [
        line.split() for line in rendered(report)
    ]
    monkeypatch.setattr(doctor, "examine", lambda **_: report)
    assert doctor.main(["--json", "-"]) == 3
    errors = [one["errors"]["o"] for one in json.loads(capsys.readouterr().out)["self_test"]]
    assert errors[1] == "nan" and 0 < errors[0] < 0.01


def test_a_gradient_alone_that_is_wrong_is_found(monkeypatch):
    attend = doctor.flash_cosine_sim_attention

    def wrong(q, **options):
        return attend(q=q + 0.05 * (q - q.detach()), **options)  # the same output, and a larger gradient

    monkeypatch.setattr(doctor, "flash_cosine_sim_attention", wrong)
    found = doctor.test_one("cpu", "sdpa", "float32", (16, 2, False, False, False))
    assert not found["right"] and found["errors"]["o"] < 1e-5 < 0.04 < found["errors"]["dq"] < 0.06


@pytest.mark.parametrize("message, cure", [
    ("CUDA error: CUDA driver version is insufficient for CUDA runtime version", "update the NVIDIA driver"),
    ("CUDA error: no kernel image is available for execution on the device", "build from source on this machine"),
    ("something else", "report it"),
])  # fmt: skip
def test_a_self_test_that_fails_is_one_line_and_a_cure(machine, monkeypatch, message, cure):
    monkeypatch.setattr(doctor, "flash_cosine_sim_attention", lambda **_: raises(message)())
    report = machine((9, 0))
    why, said = only_problem(report)
    assert f"3 of 3 self-tests fail, first bfloat16, head dim 16, causal, mask: RuntimeError: {message}" == why
    assert cure in said and report["exit_status"] == 3


def test_a_gpu_that_cannot_be_timed_is_a_problem_and_no_crash(machine, monkeypatch):
    report = machine((9, 0))
    monkeypatch.setattr(doctor, "time_one", lambda _: raises("CUDA out of memory. Tried to allocate 2 GiB")())
    problems = []
    assert doctor.time_all(problems) == [] and report["speed"]
    assert "out of memory" in problems[0]["why"] and problems[0]["cure"].startswith("free memory")


# The command


@pytest.mark.slow
def test_the_command_into_a_file(tmp_path):
    """Piped, without a locale; on any machine."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "kernels"), "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-W", "ignore", "-m", "flash_cosine_sim_attention.doctor", "--no-speed", "--json"]
    result = subprocess.run([*command, tmp_path / "report.json"], env=environment, capture_output=True, text=True)
    report = json.loads((tmp_path / "report.json").read_text())
    assert result.returncode == report["exit_status"] and not result.stderr
    assert result.stdout == "\n".join(rendered(report)) + "\n"
    assert all(one["right"] for one in report["self_test"]) and len(report["self_test"]) == 3 * len(doctor.CASES)
    assert str(ROOT) not in json.dumps(report) and os.path.expanduser("~") not in json.dumps(report)
    if not torch.cuda.is_available():
        assert result.returncode == 1 and report["gpus"] == []


@pytest.mark.parametrize("options", ["", " --json -"])
def test_the_command_read_in_part(options):
    command = f"{sys.executable} -m flash_cosine_sim_attention.doctor --no-speed{options} | head -n 1; "
    command += "exit ${PIPESTATUS[0]}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "kernels"), "CUDA_VISIBLE_DEVICES": ""}
    part = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True)
    assert part.returncode == 1 and part.stdout.count("\n") == 1 and "Traceback" not in part.stderr


def test_the_command_line(machine, monkeypatch, capsys, tmp_path):
    report = machine((9, 0))
    monkeypatch.setattr(doctor, "examine", lambda speed: report | {"speed": report["speed"] if speed else []})
    assert doctor.main([]) == 0 and "12345.678" in capsys.readouterr().out
    assert doctor.main(["--no-speed"]) == 0 and "12345.678" not in capsys.readouterr().out
    assert doctor.main(["--json", "-"]) == 0 and json.loads(capsys.readouterr().out) == report
    for wrong in (["--jsn"], ["--json", str(tmp_path / "missing" / "report.json")]):
        with pytest.raises(SystemExit) as stopped:
            doctor.main(wrong)
        assert stopped.value.code == 2 and "error:" in capsys.readouterr().err


def test_a_driver_that_does_not_answer_is_none(monkeypatch):
    def run(*_arguments, **_options):
        raise subprocess.TimeoutExpired("nvidia-smi", 30)

    monkeypatch.setattr(subprocess, "run", run)
    assert doctor.nvidia_smi() == []


def test_what_nvidia_smi_says_is_read(monkeypatch):
    output = "580.159.04, NVIDIA H200, 9.0\n580.159.04, NVIDIA A100, 8.0\n"
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, output, ""))
    assert doctor.nvidia_smi() == [SMI[0], {"driver": "580.159.04", "name": "NVIDIA A100", "capability": "8.0"}]


@pytest.mark.gpu
@pytest.mark.skipif(not ops.kernels_available(), reason=f"needs the CUDA kernels: {ops.kernels_error()}")
def test_on_this_gpu():
    report = doctor.examine()
    assert report["serves"] and all(one["right"] for one in report["self_test"]), report
    assert [one["head_dim"] for one in report["speed"]] == list(doctor.SPEED_HEAD_DIMS)
    assert all(0.01 < one["ours_ms"] < 1000 for one in report["speed"])
