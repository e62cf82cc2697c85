"""Every file of examples/, run as its docstring says, on the CPU; what it prints is held to what it claims."""

import importlib.util
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

from flash_cosine_sim_attention import flash_cosine_sim_attention, ops

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NUMBER = r"\d\.\de[+-]\d\d"


def run(name, *arguments, gpu=False):
    # One thread: two that wait for each other on a core that others use take many times as long.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **({} if gpu else {"CUDA_VISIBLE_DEVICES": ""})}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "kernels"), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, f"examples/{name}.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)


def output(name, *arguments, gpu=False):
    result = run(name, *arguments, gpu=gpu)
    assert result.returncode == 0, result.stderr
    return result.stdout


def load(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def entropy(data):
    """Bits a byte of the frequencies of data's bytes."""
    shares = [data.count(byte) / len(data) for byte in set(data)]
    return -sum(share * math.log2(share) for share in shares)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def char_gpt():
    return load("char_gpt")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_and_gives_its_command(path):
    lines = path.read_text().splitlines()
    assert f"python examples/{path.name}" in lines[0] and lines[0].startswith('"""')
    limits = {"attention.py": 30, "char_gpt.py": 130, "nanogpt_block.py": 160}
    assert len(lines) <= limits[path.name]
    assert not re.search(r"^(import|from) (lightning|hydra|models|einops|numpy)", path.read_text(), re.MULTILINE)


# ---------------------------------------------------------------- attention


def errors_of_attention(text):
    first, *rest = text.splitlines()
    errors = {name: float(error) for name, error in (line.split() for line in rest)}
    assert list(errors) == ["o", "dq", "dk", "dv", "dscale"]
    return first, errors


@pytest.mark.slow
def test_attention_equals_the_specification():
    first, errors = errors_of_attention(output("attention"))
    assert "(2, 8, 512, 64) in torch.float32 on cpu, back end sdpa" in first
    # Not zero: that would be the specification compared with itself.
    assert all(0 < error <= 1e-5 for error in errors.values()), errors


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU; PyTorch sees none")
@pytest.mark.skipif(not ops.kernels_available(), reason=f"needs the CUDA kernels: {ops.kernels_error()}")
def test_attention_runs_in_the_cuda_kernels():
    first, errors = errors_of_attention(output("attention", gpu=True))
    assert "(2, 8, 512, 64) in torch.bfloat16 on cuda, back end cuda" in first
    assert all(1e-5 < error <= 2e-2 for error in errors.values()), errors


# ---------------------------------------------------------------- char_gpt


@pytest.mark.training
def test_char_gpt_learns_more_than_byte_frequencies():
    """From the standard library, with a small model: better than any model without a context could be."""
    text = output("char_gpt", *"--steps 120 --layers 2 --width 64 --heads 2 --seq-len 64 --lr 5e-3".split())
    sizes, *losses = text.partition("\nsample:\n")[0].splitlines()
    num_bytes, unigram = re.fullmatch(r"([\d,]+) bytes; byte frequencies alone: ([\d.]+) bits per byte", sizes).groups()
    assert int(num_bytes.replace(",", "")) > 1e6 and 4 < float(unigram) < 5
    pattern = r"step +(\d+): validation loss ([\d.]+) bits per byte"
    steps, bits = zip(*(re.fullmatch(pattern, line).groups() for line in losses), strict=True)
    assert [int(step) for step in steps] == [20, 40, 60, 80, 100, 120]
    assert float(bits[-1]) < float(unigram) - 0.4
    assert float(bits[-1]) < float(bits[0]) - 1
    assert text.partition("\nsample:\n")[2].startswith("def ")


@pytest.mark.training
def test_char_gpt_reads_a_file_and_repeats_itself(tmp_path):
    """A line again and again is all but known after its first bytes; and a seeded run can be repeated."""
    line = b"the quick brown fox jumps over the lazy dog\n"
    (tmp_path / "text").write_bytes(line * 200)
    options = "--steps 60 --layers 1 --width 64 --heads 2 --seq-len 64 --batch 8 --lr 1e-2".split()
    options.append(tmp_path / "text")
    text = output("char_gpt", *options)
    assert f"{200 * len(line):,} bytes; byte frequencies alone: {entropy(line):.3f} bits" in text
    bits = [float(value) for value in re.findall(r"validation loss ([\d.]+)", text)]
    assert len(bits) == 6 and bits[-1] < 0.5 < entropy(line) - 3
    assert output("char_gpt", *options) == text


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--steps", "0"], "--steps must be positive, got 0"),
        (["--seq-len", "-1"], "--seq-len must be positive, got -1"),
        (["--lr", "nan"], "--lr must be positive, got nan"),
        (["--width", "100"], "--width / --heads must be a multiple of 8 up to 256, got 100 / 4"),
        (["/absent/text"], "text_file must be a file of 20 * --seq-len = 2560 bytes or more, got 0"),
    ],
)
def test_char_gpt_refuses(char_gpt, monkeypatch, capsys, arguments, named):
    monkeypatch.setattr(sys, "argv", ["char_gpt.py", *arguments])
    with pytest.raises(SystemExit) as refusal:
        char_gpt.main()
    assert refusal.value.code == 2 and named in capsys.readouterr().err


@pytest.fixture
def small_gpt(char_gpt):
    gpt = char_gpt.GPT(layers=2, width=32, heads=2)
    assert torch.equal(gpt(torch.zeros(1, 3, dtype=torch.long)), torch.zeros(1, 3, 256))  # 8 bits a byte
    torch.nn.init.normal_(gpt.head.weight)
    return gpt


def test_char_gpt_is_causal_and_sees_all_that_is_before(small_gpt):
    tokens = torch.randint(256, (1, 20))
    logits = small_gpt(tokens)
    for position in (0, 7, 19):
        changed = tokens.clone()
        changed[0, position] = (tokens[0, position] + 1) % 256
        differs = (small_gpt(changed) - logits).abs().amax(-1)[0] > 1e-4
        assert differs.tolist() == [index >= position for index in range(20)]


def test_char_gpt_rotates_by_relative_position(char_gpt):
    """q . k depends on the distance of their positions alone, and norms stay."""
    q, k = torch.randn(2, 8)
    angle = torch.outer(torch.arange(12.0), 10_000 ** -(torch.arange(4) / 4))
    cos, sin = angle.cos(), angle.sin()
    rotated_q, rotated_k = (char_gpt.rotate(x.expand(12, 8), cos, sin) for x in (q, k))
    products = rotated_q @ rotated_k.T
    torch.testing.assert_close(products[1:, 1:], products[:-1, :-1], rtol=0, atol=1e-5)
    assert (products[0, 0] - products[5, 0]).abs() > 1e-2
    torch.testing.assert_close(rotated_q.norm(dim=-1), q.norm().expand(12))


def test_char_gpt_holds_scales_at_the_librarys_bound(char_gpt, monkeypatch):
    """A step that takes scales above 60, where the library refuses them or has no gradient for them, ends at 60."""
    made = []

    class Kept(char_gpt.GPT):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            made.append(self)

    monkeypatch.setattr(char_gpt, "GPT", Kept)
    options = "--steps 2 --layers 1 --width 16 --heads 2 --seq-len 16 --batch 2".split()
    monkeypatch.setattr(sys, "argv", ["char_gpt.py", *options])
    raised = register_optimizer_step_post_hook(lambda *_: made[0].blocks[0].log_scale.data.add_(9.0))
    try:
        char_gpt.main()
    finally:
        raised.remove()
    scales = made[0].blocks[0].log_scale.exp()
    assert scales.max() <= 60 and scales.tolist() == pytest.approx([60, 60], rel=1e-4)


def test_char_gpt_scores_every_byte_once(char_gpt, small_gpt):
    data = torch.randint(256, (4 * 8 + 1,), dtype=torch.uint8)
    nats = 0.0
    with torch.no_grad():
        for index in range(1, len(data)):
            start = (index - 1) // 8 * 8
            nats -= small_gpt(data[None, start:index].long())[0, -1].log_softmax(-1)[data[index].long()].item()
    expected = nats / (len(data) - 1) / math.log(2)
    assert char_gpt.bits_per_byte(small_gpt, data, seq_len=8, batch=3) == pytest.approx(expected, rel=1e-5)


# ---------------------------------------------------------------- nanogpt_block


@pytest.mark.slow
def test_nanogpt_block_equals_what_it_says():
    text = output("nanogpt_block")
    assert "regular: output (2, 256, 384), 12 of 12 parameters have a gradient\n" in text
    assert "cosine-sim: output (2, 256, 384), 13 of 13 parameters have a gradient\n" in text
    by_hand, qk_norm, regular = map(float, re.findall(rf"({NUMBER}) apart", text))
    assert 0 < by_hand < 1e-5 and 0 < qk_norm < 1e-5
    assert regular > 1e-2  # so that the comparison can tell attentions apart


def test_nanogpt_block_shows_the_lines_that_change():
    """The docstring's before and after are the code's."""
    source = (ROOT / "examples" / "nanogpt_block.py").read_text()
    docstring, code = source.split('"""', 2)[1:]
    changed = re.findall(r"^    [+-]   (.*)$", docstring, re.MULTILINE)
    assert len(changed) == 4
    for line in changed:
        assert line.removeprefix("y = ") in code, line


def test_nanogpt_blocks_qk_norm_is_the_default_scale_at_head_dim_64():
    example = load("nanogpt_block")
    config = example.Config(n_head=2, n_embd=128)
    q, k, v = torch.randn(3, 2, 2, 16, 64)
    expected = flash_cosine_sim_attention(q, k, v, causal=True)
    torch.testing.assert_close(example.QKNorm(config).attend(q, k, v), expected)
    with pytest.raises(ValueError, match="n_head must divide n_embd = 128, got 3"):
        example.CausalSelfAttention(example.Config(n_head=3, n_embd=128))
    assert F.mse_loss(example.CausalSelfAttention(config).attend(q, k, v), expected) > 1e-4
