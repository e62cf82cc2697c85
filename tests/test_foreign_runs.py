"""A run's folder that somebody else made: whatever its config.yaml says, nothing of it is run."""

import os
import shutil
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from support.runs import untrained_run

from conf.registry import BUILDERS, FORMER_TARGETS
from conf.stored import read_stored
from scripts import compare, evaluate, generate

pytestmark = pytest.mark.slow  # a second each: a process of its own

KINDS = ", ".join(BUILDERS["attention"])
TEXT = bytes(range(97, 107)) * 40


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return untrained_run(tmp_path_factory.mktemp("sound"), TEXT)


def payloads(folder):
    """Configurations of Hydra's kind, each of which makes folder/canary where it is carried out."""
    canary = folder / "canary"
    (folder / "hub").mkdir(exist_ok=True)
    (folder / "hub" / "hubconf.py").write_text(f"def model():\n    open({str(canary)!r}, 'w')\n")
    torch.save(Touch(canary), folder / "torch.pt")
    np.save(folder / "numpy.npy", np.array([Touch(canary)], dtype=object), allow_pickle=True)
    hub = {"repo_or_dir": str(folder / "hub"), "model": "model", "source": "local"}
    return {
        "torch.load": {"_target_": "torch.load", "f": str(folder / "torch.pt"), "weights_only": False},
        "numpy.load": {"_target_": "numpy.load", "file": str(folder / "numpy.npy"), "allow_pickle": True},
        "torch.hub.load": {"_target_": "torch.hub.load", **hub},
        "builtins.exec": {"_target_": "builtins.exec", "_args_": [f"open({str(canary)!r}, 'w')"]},
        "os.system": {"_target_": "os.system", "command": f"touch {canary}"},
    }


NAMES = ["torch.load", "numpy.load", "torch.hub.load", "builtins.exec", "os.system"]
FORMER_COSINE = {"_target_": "models.attention.CosineAttention", "_partial_": True}


def place(config, where, payload):
    """The run's configuration with the payload in it."""
    if where == "everything":
        return payload
    if where == "beside all keys":
        return {**payload, **config}
    if where == "former _args_":
        return {**config, "attention": {**FORMER_COSINE, "_args_": [payload]}}
    if where == "beside a kind":
        return {**config, "attention": {**config["attention"], **payload}}
    if where == "_args_":
        return {**config, "attention": {**config["attention"], "_args_": [payload]}}
    group, _, key = where.partition(".")
    if not key:
        return {**config, group: payload}
    value = [payload, payload] if key in ("betas", "tags") else payload
    return {**config, group: {**config[group], key: value}}


# Where it stands, and which of the two scripts reads that part of the configuration.
PLACES = {
    "everything": "both", "attention": "both", "norm": "both", "model": "both", "trainer": "both", "data": "both",
    "optimizer": "both", "logger": "both", "attention.scale": "both", "attention.kind": "both",
    "model.attention": "both", "model.block": "both", "model.width": "both", "data.path": "evaluate",
    "data.pattern": "evaluate", "optimizer.betas": "neither", "trainer.precision": "both", "seq_len": "both",
    "micro_batch_tokens": "both", "former _args_": "both", "beside a kind": "both", "_args_": "both",
    "beside all keys": "neither", "run_root": "both",
}  # fmt: skip


def answers(capsys, run):
    """Which scripts refuse the run; each in one line."""
    refused = []
    for script in (generate, evaluate):
        extra = ["--num-bytes", "2"] if script is generate else ["--max-bytes", "17"]
        code = script.main([str(run), "--device", "cpu", *extra])
        error = capsys.readouterr().err
        if code:
            assert code == 2 and error.startswith("error: ") and error.count("\n") == 1 and len(error) < 1200, error
            refused.append(script)
    return {(): "neither", (generate, evaluate): "both", (evaluate,): "evaluate"}[tuple(refused)]


def hostile(sound, folder, config):
    run = shutil.copytree(sound, folder / "runs" / "run")
    (run / "config.yaml").write_text(config if isinstance(config, str) else OmegaConf.to_yaml(config))
    return run


@pytest.fixture(autouse=True)
def left_as_it_was(monkeypatch, tmp_path):
    """Torch hub keeps its list of trusted folders elsewhere, and the folders of this test are no modules later."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.mark.parametrize("name", NAMES)
def test_each_payload_would_run(tmp_path, name):
    options = payloads(tmp_path)[name]
    module, _, function = options.pop("_target_").rpartition(".")
    getattr(import_module(module), function)(*options.pop("_args_", ()), **options)
    assert (tmp_path / "canary").exists()


def test_the_sound_run_is_read(sound, capsys):
    assert answers(capsys, sound) == "neither"


EVERYWHERE = [("torch.load", where) for where in PLACES]
OTHERS = [
    (name, where) for name in NAMES[1:] for where in ("attention", "model.attention", "former _args_", "data.path")
]


@pytest.mark.parametrize(("name", "where"), EVERYWHERE + OTHERS)
def test_nothing_that_a_configuration_names_is_run(sound, tmp_path, capsys, name, where):
    config = OmegaConf.to_container(OmegaConf.load(sound / "config.yaml"))
    run = hostile(sound, tmp_path, place(config, where, payloads(tmp_path)[name]))
    assert answers(capsys, run) == PLACES[where]
    assert not (tmp_path / "canary").exists()


def test_compare_runs_nothing_either(sound, tmp_path, capsys):
    config = OmegaConf.to_container(OmegaConf.load(sound / "config.yaml"))
    for where in PLACES:
        folder = shutil.copytree(sound, tmp_path / "runs" / where.replace(" ", "-"))
        OmegaConf.save(OmegaConf.create(place(config, where, payloads(tmp_path)["os.system"])), folder / "config.yaml")
    assert compare.main([str(tmp_path / "runs")]) == 0
    assert "Traceback" not in capsys.readouterr().err and not (tmp_path / "canary").exists()


@pytest.mark.parametrize("reference", ["${oc.env:SECRET}", "a${oc.env:SECRET}", "${oc.decode:'{a: 1}'}", "${seq_len}"])
@pytest.mark.parametrize("key", ["run_root", "seq_len", "data.path", "logger", "optimizer.betas"])
def test_references_are_refused_and_read_nothing(sound, tmp_path, capsys, monkeypatch, key, reference):
    monkeypatch.setenv("SECRET", "hunter2")
    config = OmegaConf.load(sound / "config.yaml")
    OmegaConf.update(config, key, [reference] if key == "optimizer.betas" else reference)
    run = hostile(sound, tmp_path, config)
    for script in (generate, evaluate):
        assert script.main([str(run)]) == 2
        error = capsys.readouterr().err
        assert f"{key}" in error and "must be a value, got the reference" in error and "hunter2" not in error
    assert compare.main([str(run)]) == 0
    assert "hunter2" not in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("attention: !!python/object/apply:os.system ['touch canary']", "could not determine a constructor"),
        ("a: &a [1]\nb: [*a, *a]", "refers to the anchor 'a'"),
        ("[" * 1500, "is not YAML"),
        ("a: " + "{b: " * 1500, "is not YAML"),
        ("- 1", "must hold keys and values, got a list"),
        ("a: [", "is not YAML"),
        ("attention: 3", "attention must be one of cosine, "),
        ("? [1, 2]\n: 3", "is not YAML"),
        ('"\\e[2Jx": "${x}"', "must be a value, got the reference"),
        ('attention: {kind: cosine, "\\e[2J": 1}', "is not a key; accepted: attention.scale"),
        ("", "attention must be one of"),
        ("attention: {_target_: [models.attention.CosineAttention]}", "attention must be of kind cosine, "),
        ("attention: {_target_: models.blocks.PreNormBlock}", "attention must be of kind cosine, "),
        ("attention: {_target_: models.attention.torch.load}", "attention must be of kind cosine, "),
        ("attention: {kind: __class__}", f"attention.kind must be one of {KINDS}; got '__class__'"),
    ],
)
def test_what_is_no_stored_configuration_is_refused_in_one_line(sound, tmp_path, capsys, monkeypatch, text, said):
    monkeypatch.chdir(tmp_path)
    run = hostile(sound, tmp_path, text)
    assert generate.main([str(run)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error and "\x1b" not in error
    assert compare.main([str(run)]) == 0
    assert not (tmp_path / "canary").exists()


def test_earlier_runs_which_named_classes_are_read(sound, tmp_path, capsys):
    config = OmegaConf.to_container(OmegaConf.load(sound / "config.yaml"))
    names = {value: key for key, value in FORMER_TARGETS.items()}
    former = dict(config)
    for group in ("attention", "norm", "model", "data", "optimizer", "logger"):
        options = dict(config[group])
        target = {"_target_": names[group, options.pop("kind")]}
        former[group] = {**target, **({"_partial_": True} if group in ("attention", "norm") else {}), **options}
    run = hostile(sound, tmp_path, former)
    assert OmegaConf.to_container(read_stored(run / "config.yaml")) == config
    assert answers(capsys, run) == "neither"


def test_a_file_elsewhere_is_not_read_as_a_configuration(sound, tmp_path, capsys):
    run = hostile(sound, tmp_path, "")
    (run / "config.yaml").unlink()
    os.mkfifo(run / "config.yaml")  # opening it would wait for ever
    assert generate.main([str(run)]) == 2
    assert "has no config.yaml" in capsys.readouterr().err
