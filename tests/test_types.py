"""The library's annotations, as mypy --strict reads them.

By hand: `MYPYPATH=kernels python -m mypy --strict --follow-imports=silent` with the files of CHECKED. mypy is no
requirement of the tests; `pip install mypy` gets it, and until then these are skipped.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "kernels" / "flash_cosine_sim_attention"
NAMES = ("__init__", "interface", "call", "scales", "flash_attn_interface", "functional", "huggingface")
NAMES += ("huggingface_mask", "sharding", "doctor", "doctor_text")
CHECKED = [PACKAGE / f"{name}.py" for name in NAMES]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="needs mypy: pip install mypy"),
]

USER = """
import torch
from torch import Tensor
from flash_cosine_sim_attention import flash_cosine_sim_attention, l2norm_tensors, plain_cosine_sim_attention
from flash_cosine_sim_attention import flash_cosine_sim_attention_varlen
from flash_cosine_sim_attention import cosine_scale, flash_attn_interface
from flash_cosine_sim_attention.functional import scaled_dot_product_attention

x = torch.ones(1, 1, 3, 8)
one: Tensor = flash_cosine_sim_attention(x, x, x)
also: Tensor = plain_cosine_sim_attention(x, x, x, None, None, torch.ones(1), causal=True, return_partials=False)
two: tuple[Tensor, Tensor] = flash_cosine_sim_attention(x, x, x, backend="sdpa", return_partials=True)
flag = bool(x.sum() > 0)
either: Tensor | tuple[Tensor, Tensor] = flash_cosine_sim_attention(x, x, x, return_partials=flag)
either = plain_cosine_sim_attention(x, x, x, return_partials=flag)
more: tuple[Tensor, Tensor] = plain_cosine_sim_attention(x, x, x, return_partials=True)
near: Tensor = flash_cosine_sim_attention(x, x, x, causal=True, window_size=(128, 0))
also_near: Tensor = plain_cosine_sim_attention(x, x, x, window_size=[1, 1])
bounds = torch.tensor([0, 1, 3], dtype=torch.int32)
packed: Tensor = flash_cosine_sim_attention_varlen(x[0], x[0], x[0], bounds, bounds, 2, 2, window_size=(128, 0))
scale: float | Tensor = cosine_scale(64, 0.1, gain_q=torch.ones(4), num_heads=4)
shaped: Tensor = flash_attn_interface.flash_attn_func(x, x, x, causal=True, window_size=(128, None), gain_q=1.2)
ends = (bounds, bounds, 2, 2)
also_packed: Tensor = flash_attn_interface.flash_attn_varlen_func(x[0], x[0], x[0], *ends, softmax_scale=0.1)
like_torch: Tensor = scaled_dot_product_attention(x, x, x, is_causal=True, scale=torch.ones(()), enable_gqa=True)
many: tuple[Tensor, ...] = l2norm_tensors(x, x, groups=2)
"""
WRONG = {
    "flash_cosine_sim_attention(x, x, x, casual=True)": "call-overload",
    "flash_cosine_sim_attention(x, x, x, groups=0.5)": "call-overload",
    "plain_cosine_sim_attention(x, x, x, backend='sdpa')": "call-overload",
    "flash_cosine_sim_attention(x, x, x, window_size=128)": "call-overload",
    "flash_cosine_sim_attention_varlen(x, x, x, bounds, bounds, 2, 2, mask=x > 0)": "call-arg",
    "l2norm_tensors(x, groups='2')": "arg-type",
    "flash_attn_interface.flash_attn_func(x, x, x, dropout=0.1)": "call-arg",
    "scaled_dot_product_attention(x, x, x, scale='1')": "arg-type",
    "one.no_such_method()": "attr-defined",
}


def mypy(*arguments, cwd):
    environment = os.environ | {"MYPYPATH": str(PACKAGE.parent)}
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--cache-dir", str(cwd), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)


def test_the_public_interface_and_its_users_are_typed(tmp_path):
    """What is right passes; of what is wrong, each line is found. One test: reading torch's types takes a while."""
    (tmp_path / "user.py").write_text(USER)
    run = mypy(*map(str, CHECKED), "user.py", cwd=tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    first = len(USER.splitlines()) + 1
    (tmp_path / "user.py").write_text(USER + "".join(f"{line}\n" for line in WRONG))
    run = mypy("user.py", cwd=tmp_path)
    found = re.findall(r"^user\.py:(\d+): error: .*\[(.*)\]$", run.stdout, re.MULTILINE)
    assert set(found) == {(str(number), code) for number, code in enumerate(WRONG.values(), first)}, run.stdout
