"""What an option builds satisfies its group's protocol: by its members, and by what these do with tensors."""

import hashlib
import inspect
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import Logger
from omegaconf import OmegaConf
from support.configuration import configure
from support.optimizers import Momentum
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from conf.registry import BUILDERS, PROTOCOLS, protocol_of
from conf.schema import builder, options_of
from data.bytes import ByteDataModule, Corpus
from models.attention import InnerAttention, KVCache, SelfAttention
from models.blocks import MLP, Block
from models.positions import position_bias_of
from models.training.optimizer import OptimizerBuilder

WIDTH, HEADS, HEAD_DIM = 32, 4, 8


def lacks(built, protocol):
    """The members of a protocol that something lacks, or that take other arguments there."""
    members = {name: getattr(protocol, name) for name in vars(protocol) if not name.startswith("_")}
    missing = [name for name in (*members, *inspect.get_annotations(protocol)) if not hasattr(built, name)]
    for name, member in members.items():
        if callable(member) and name not in missing:
            # of an instance its first argument is filled in; of a protocol only where it is a static method
            wanted = [parameter for parameter in inspect.signature(member).parameters if parameter != "self"]
            if list(inspect.signature(getattr(built, name)).parameters)[: len(wanted)] != wanted:
                missing.append(name)
    return missing


def each(group):
    return pytest.mark.parametrize("option", options_of(group))


def build(group, option, *changes, **given):
    """What an option of conf/ builds."""
    config = configure(f"{group}={option}", "seq_len=16", *changes)
    return builder(OmegaConf.create(OmegaConf.to_container(config, resolve=True)), group)(**given)


def test_every_group_has_its_protocol_and_says_what_it_asks_for():
    assert set(PROTOCOLS) == set(BUILDERS) - {"model", "logger"}
    for group in PROTOCOLS:
        assert inspect.getdoc(protocol_of(group)), group
        for name in vars(protocol_of(group)):
            if callable(getattr(protocol_of(group), name)) and not name.startswith("_"):
                assert inspect.getdoc(getattr(protocol_of(group), name)), (group, name)


ATTENTION = {"num_heads": HEADS, "head_dim": HEAD_DIM, "layer": 0, "num_layers": 2}


WINDOWED = [option for option in options_of("attention") if "window" in configure(f"attention={option}").attention]


@pytest.mark.parametrize("num_kv_heads", [4, 1])
@pytest.mark.parametrize(
    ("option", "window"), [*((option, None) for option in options_of("attention")), *((one, 3) for one in WINDOWED)]
)
def test_attentions(option, num_kv_heads, window):
    torch.manual_seed(0)
    changes = [] if window is None else [f"attention.window={window}"]
    inner = build("attention", option, *changes, **ATTENTION)
    assert inner.window == window
    assert isinstance(inner, nn.Module) and not lacks(inner, InnerAttention)
    q = torch.randn(2, HEADS, 7, HEAD_DIM)
    k, v = (torch.randn(2, num_kv_heads, 7, HEAD_DIM) for _ in range(2))
    o = inner(q, k, v)
    assert o.shape == q.shape and o.dtype == q.dtype
    torch.testing.assert_close(inner(q[:, :, -1:], k, v), o[:, :, -1:])  # decoding: one query, and keys of a cache
    torch.testing.assert_close(inner(q[:, :, :4], k[:, :, :4], v[:, :, :4]), o[:, :, :4])  # causal
    logit = inner.largest_logit(q, k)
    assert logit.shape == () and logit.dtype == torch.float32 and logit > 0
    # A run with model.positions=alibi that knew no positions would be recorded as one that did.
    bias = position_bias_of("alibi", num_heads=HEADS, seq_len=7)
    try:
        biased = build("attention", option, *changes, **ATTENTION, position_bias=bias)
    except ValueError:
        return
    biased.load_state_dict(inner.state_dict())
    assert not torch.allclose(biased(q, k, v)[:, :, 1:], o[:, :, 1:])


@each("norm")
def test_blocks(option):
    torch.manual_seed(0)
    inner = build("attention", "regular", **ATTENTION)
    attention = SelfAttention(WIDTH, HEADS, HEADS, inner=inner, rotary=None, dropout=0.0)
    block = build("norm", option, width=WIDTH, num_layers=2, attention=attention, mlp=MLP(WIDTH, dropout=0.0))
    assert isinstance(block, nn.Module) and not lacks(block, Block)
    assert block.attention is attention

    def stream(x, branch=None, cache=None):
        x, branch = block(x, branch, cache)
        return x if branch is None else x + branch

    x = torch.randn(2, 5, WIDTH)
    whole = stream(x)
    assert whole.shape == block.final_norm(WIDTH)(whole).shape == x.shape and whole.dtype == x.dtype
    if block(x, None, None)[1] is not None:  # it leaves an addition to the next one, and so makes that of the last
        torch.testing.assert_close(stream(x - 1, torch.ones_like(x)), whole)
    cache = KVCache((2, HEADS, 5, HEAD_DIM), device=torch.device("cpu"), dtype=torch.float32)
    torch.testing.assert_close(torch.cat((stream(x[:, :4], cache=cache), stream(x[:, 4:], cache=cache)), 1), whole)


@pytest.mark.parametrize("option", [*options_of("optimizer"), None], ids=str)
def test_optimizers(option):
    optimizer = build("optimizer", option, "max_steps=20") if option else Momentum(lr=0.1, momentum=0.9)
    assert not lacks(optimizer, OptimizerBuilder)
    model = nn.Sequential(nn.Embedding(4, 8), nn.LayerNorm(8), nn.Linear(8, 8))
    built, scheduler = optimizer.build(model)
    taken = [parameter for group in built.param_groups for parameter in group["params"]]
    assert len(taken) == len(set(taken)) and set(taken) == set(model.parameters())
    assert isinstance(built, torch.optim.Optimizer) and isinstance(scheduler, LambdaLR)
    peaks = [group["initial_lr"] for group in built.param_groups]
    assert peaks[0] == optimizer.lr
    for step in range(20):
        fraction = optimizer.lr_at(step) / optimizer.lr  # of every group's own peak
        assert [group["lr"] for group in built.param_groups] == pytest.approx([peak * fraction for peak in peaks])
        model(torch.arange(4)).square().sum().backward()
        built.step()
        scheduler.step()


@each("data")
def test_corpora(option, tmp_path):
    (tmp_path / "text").write_bytes(bytes(range(97, 107)) * 40)
    own = [f"data.path={tmp_path / 'text'}"]
    changes = {"file": own, "enwik8": [*own, "data.expected_bytes=400", "data.expected_sha256=null"]}
    corpus = build("data", option, *changes.get(option, []))
    assert isinstance(corpus, Corpus) and isinstance(corpus.name, str)
    splits = [getattr(corpus, split) for split in ("train", "val", "test")]
    assert all(isinstance(split, np.ndarray) and split.dtype == np.uint8 and split.ndim == 1 for split in splits)
    record = json.loads(json.dumps(corpus.provenance))
    assert record["sha256"] == hashlib.sha256(np.concatenate(splits)).hexdigest()
    assert record["bytes"] == sum(map(len, splits))


def test_a_corpus_of_somebody_else_is_trained_on():
    split = np.arange(100, dtype=np.uint8)
    corpus = SimpleNamespace(name="own", train=split, val=split, test=split, provenance={"sha256": "0", "bytes": 300})
    sizes = {"seq_len": 8, "micro_batch_size": 2, "accumulate": 1, "windows_per_step": 2, "eval_batch_size": 1}
    data = ByteDataModule(corpus, num_micro_batches=1, seed=0, **sizes)
    assert data.train_batch(0, 0, 0, torch.device("cpu")).shape == (2, 9)
    corpus.val = split.astype(np.int64)
    with pytest.raises(TypeError, match="val must be a 1-D numpy array of uint8, got int64, 1-D"):
        ByteDataModule(corpus, num_micro_batches=1, seed=0, **sizes)


@each("logger")
def test_loggers_are_lightnings(option, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")  # it needs a process of its own; test_train.py has it offline
    loggers = build("logger", option, run_dir=tmp_path, resume_step=None, wandb_id="an-id")
    assert loggers and all(isinstance(logger, Logger) for logger in loggers)
    loggers[-1].log_metrics({"train/loss": 1.0}, step=1)
    assert (tmp_path / "metrics.csv").read_text().splitlines() == ["step,train/loss", "1,1.0"]


class Halfway:
    """Has some of each protocol, and of that not all."""

    def forward(self, x, branch):
        """Takes no cache, and not q, k and v."""

    def build(self, model):
        """As it should be."""

    def lr_at(self, step):
        """As it should be."""


def test_what_a_protocol_asks_for_and_is_not_there_is_found():
    assert lacks(Halfway(), InnerAttention) == ["largest_logit", "window", "forward"]
    assert lacks(Halfway(), Block) == ["final_norm", "attention", "forward"]
    assert lacks(Halfway(), OptimizerBuilder) == ["lr"]
