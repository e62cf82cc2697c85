"""Every YAML composes and builds; every wrong value is refused with the key and what is accepted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import OmegaConf, open_dict

from conf.schema import GROUPS, ConfigError, hints, validate
from models.trainer import build_trainer, choose_precision, compiles_by_default, micro_batches, uses_cuda
from train import build_module

ROOT = Path(__file__).parent.parent
OPTIONS = [(group, path.stem) for group in GROUPS for path in sorted((ROOT / "conf" / group).glob("*.yaml"))]
EXPERIMENTS = [path.stem for path in sorted((ROOT / "conf" / "experiment").glob("*.yaml"))]
DEBUGS = [path.stem for path in sorted((ROOT / "conf" / "debug").glob("*.yaml"))]
SWEEPS = [path.stem for path in sorted((ROOT / "conf" / "sweep").glob("*.yaml"))]


def configure(*overrides):
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("config", overrides=list(overrides), return_hydra_config=True)
    HydraConfig.instance().set_config(config)  # what ${hydra:...} refers to
    with open_dict(config):
        del config["hydra"]
    return config


def needed(group, option):
    return ["data.path=some/file"] if (group, option) == ("data", "file") else []


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes_validates_and_names_what_exists(group, option):
    config = validate(configure(f"{group}={option}", *needed(group, option)))
    if group in ("attention", "norm", "model", "optimizer"):
        build_module(config)
    if group == "trainer":
        build_trainer(
            run_dir=Path("unused"), loggers=[], callbacks=[], max_steps=3, accumulate=2, options=config.trainer
        )
    if group in ("data", "logger"):
        assert callable(instantiate({**config[group], "_partial_": True}))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_builds_its_model(experiment):
    config = validate(configure(f"experiment={experiment}"))
    module = build_module(config)
    assert module.gpt.seq_len == config.seq_len
    size, accumulate = micro_batches(config.tokens_per_step, 16384, config.seq_len, 1)
    assert size * accumulate * config.seq_len == config.tokens_per_step


def test_enwik8_experiment_has_the_size_and_length_of_the_predecessor():
    config = validate(configure("experiment=enwik8"))
    assert (config.model.num_layers, config.model.width, config.model.num_heads) == (8, 512, 8)
    assert (config.seq_len, config.tokens_per_step, config.max_steps) == (1024, 16 * 1024, 100_000)


NAMED = {"experiment": EXPERIMENTS, "debug": DEBUGS, "sweep": SWEEPS}


@pytest.mark.parametrize("name", [f"{group}/{option}" for group, options in NAMED.items() for option in options])
def test_experiments_and_sweeps_say_their_command_and_only_override(name):
    text = (ROOT / "conf" / f"{name}.yaml").read_text()
    group, option = name.split("/")
    assert f"{group}={option}" in text.splitlines()[1]
    known = {*OmegaConf.load(ROOT / "conf/config.yaml"), *GROUPS, "sweep"}  # sweep: what the file refers to itself
    assert set(OmegaConf.create(text)) <= known


@pytest.mark.parametrize("experiment", [None, *EXPERIMENTS])
def test_debugging_goes_with_every_experiment(experiment):
    chosen = [f"experiment={experiment}"] if experiment else []
    fast = validate(configure(*chosen, "debug=fast"))
    assert (fast.max_steps, fast.model.width, fast.model.seq_len, fast.run_root) == (4, 32, 64, "runs/debug")
    assert fast.data._target_.endswith("pystdlib") and fast.trainer.val_bytes == 2048
    larger = validate(configure(*chosen, "debug=fast", "model=small", "max_steps=9", "norm=post"))
    assert (larger.max_steps, larger.model.tied_head) == (9, False) and larger.norm._target_.endswith("PostNormBlock")


@pytest.mark.parametrize("attention", ["cosine", "regular"])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_every_arm_of_the_first_comparison_sees_the_same_bytes_at_a_rate_of_its_own(attention, norm):
    arm = [f"attention={attention}", f"norm={norm}", "data=file", "data.path=x"]
    parts = (("first_comparison_lr", []), ("first_comparison", []), ("first_comparison", ["seq_len=8192"]))
    rates, final, long = (validate(configure(f"sweep={name}", *arm, *more)) for name, more in parts)
    sweep = OmegaConf.load(ROOT / "conf/sweep/first_comparison.yaml")
    assert final.lr == long.lr == final.optimizer.lr == OmegaConf.to_container(sweep.sweep)["lr"][attention][norm]
    assert rates.model.num_layers == final.model.num_layers == 8 and long.model.seq_len == 8192
    for config in (rates, final, long):
        assert config.micro_batch_tokens == config.tokens_per_step == 65536 and config.max_steps == 800
        assert config.trainer.val_bytes is None


def test_command_line_of_the_readme_composes():
    config = validate(configure("attention=cosine", "seq_len=8192"))
    assert config.model.seq_len == 8192
    assert config.attention._target_.endswith("CosineAttention")
    config = validate(configure("experiment=long_context", "attention=regular", "norm=post"))
    assert config.norm._target_.endswith("PostNormBlock")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lr=abc", "lr must be a number, got 'abc'"),
        ("seq_len=8k", "seq_len must be an integer, got '8k'"),
        ("tokens_per_step=1.5", "tokens_per_step must be an integer, got 1.5"),
        ("test=maybe", "test must be true or false, got 'maybe'"),
        ("compile=fast", "compile must be true or false or null, got 'fast'"),
        ("trainer.val_every=null", "trainer.val_every must be an integer, got None"),
        ("model.width=wide", "model.width must be an integer, got 'wide'"),
        ("model=huge", "Available options in 'model':\n\tbase\n\tsmall\n\ttiny"),
        ("optimizer.betas=[a,b]", "optimizer.betas must be a list, each entry a number"),
        ("+flash=1", "flash is not a key; accepted: seq_len, max_steps"),
        ("+model.depth=3", "model.depth is not a key; accepted: model.num_layers, model.width"),
        ("+trainer.epochs=3", "trainer.epochs is not a key; accepted: trainer.accelerator"),
        ("data=file", "data.path must be given, e.g. data.path=VALUE"),
        (
            "attention._target_=models.attention.Linear",
            "attention._target_='models.attention.Linear' cannot be imported",
        ),
        ("~attention", "attention must be an option of conf/attention/"),
    ],
)
def test_wrong_values_name_the_key_and_what_is_accepted(override, message):
    with pytest.raises(Exception) as caught:
        validate(configure(override))
    assert message in str(caught.value)
    assert isinstance(caught.value, ConfigError) or override == "model=huge"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.num_heads=7"], "model.num_heads must divide model.width = 512, got 7"),
        (["model.width=1056", "model.num_heads=4"], "multiple of 8 up to 256, got 264"),
        (["lr=-1"], "lr must be a positive number, got -1"),
        (["max_steps=0"], "max_steps must be at least 1, got 0"),
        (["optimizer.decay=exponential"], "optimizer.decay must be cosine or linear, got 'exponential'"),
        (["trainer.clip_norm=-1"], "trainer.clip_norm must be positive or null, got -1"),
        (["trainer.accelerator=tpu"], "trainer.accelerator must be auto, cpu or gpu, got 'tpu'"),
    ],
)
def test_wrong_ranges_are_refused_when_the_model_is_built(overrides, message):
    config = validate(configure(*overrides))
    with pytest.raises(Exception, match=message):
        build_module(config)


def test_an_unknown_key_on_the_command_line_is_answered_with_the_accepted_ones():
    assert "accepted: seq_len, max_steps" in hints(["seqlen=8"])[0]
    assert "model.depth is not a key; model accepts base: _target_, num_layers, width" in hints(["model.depth=3"])[0]
    assert (
        hints(["seq_len=8", "attention=cosine", "+anything=1", "-m", "hydra.verbose=true", "attention.scale=3"]) == []
    )
    command = [sys.executable, "train.py", "seqlen=8"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "kernels")}
    answer = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert answer.returncode != 0
    assert "seqlen is not a key; accepted: seq_len, max_steps" in answer.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((65536, 16384, 1024, 1), (16, 4)),
        ((65536, 16384, 8192, 1), (2, 4)),
        ((65536, 1, 8192, 1), (1, 8)),  # at least one sequence
        ((65536, 16384, 1000, 1), (13, 5)),  # 65 sequences, at most 16 at once
        ((65536, 10**9, 1024, 2), (32, 1)),
        ((1024, 10**9, 1024, 1), (1, 1)),
    ],
)
def test_a_step_is_cut_into_equal_micro_batches(arguments, expected):
    assert micro_batches(*arguments) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1000, 16384, 1024, 1), "tokens_per_step must be at least seq_len = 1024, one sequence a step, got 1000"),
        ((3072, 16384, 1024, 2), "= 3 sequences a step must be a multiple of trainer.devices = 2"),
        ((1024, 0, 1024, 1), "micro_batch_tokens must be at least 1, got 0"),
        ((1024, 1, 0, 1), "seq_len must be at least 1, got 0"),
        ((1024, 1, 1024, 0), "trainer.devices must be at least 1, got 0"),
    ],
)
def test_steps_that_cannot_be_cut_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        micro_batches(*arguments)


def test_compiling_by_default_needs_a_gpu_and_a_c_compiler(monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("CC", "gcc")
    assert compiles_by_default(cuda=True) and not compiles_by_default(cuda=False)
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not compiles_by_default(cuda=True)
    assert "no C compiler was found" in caplog.text


def test_precision_follows_the_device():
    assert choose_precision(None, cuda=True) == "bf16-mixed"
    assert choose_precision(None, cuda=False) == "32-true"
    with pytest.raises(ValueError, match="got '16-mixed'"):
        choose_precision("16-mixed", cuda=True)
    assert not uses_cuda("cpu")
