"""What looks like a secret is not written into a run's folder, nor sent to a logger."""

import sys

import pytest
import torch
from support.configuration import configure

import train
from conf.registry import BUILDERS
from conf.schema import validate
from conf.secrets import redact, redact_tree, redact_words, redacted_command_line
from models.training.environment import environment
from models.training.module import DivergedError
from models.training.processes import find_processes
from models.training.runs import Run
from models.training.stopping import Interrupted
from scripts import benchmark

SECRET = "hunter2"


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("WANDB_API_KEY=hunter2", "WANDB_API_KEY=***"),
        ("+hydra.job.env_set.WANDB_API_KEY=a,hunter2 b", "+hydra.job.env_set.WANDB_API_KEY=***"),
        ("hydra.job.env_set={WANDB_API_KEY:hunter2,HF_TOKEN:'hunter2 x',X:1}",
         "hydra.job.env_set={WANDB_API_KEY:***,HF_TOKEN:***,X:1}"),
        ("+logger.api_key=hunter2", "+logger.api_key=***"),
        ("password=hunter2", "password=***"),
        ("--password=hunter2", "--password=***"),
        ("db-secret=hunter2", "db-secret=***"),
        ("AWS_SECRET_ACCESS_KEY=hunter2", "AWS_SECRET_ACCESS_KEY=***"),
        ("data.path=https://me:hunter2@host.org/x?y=1", "data.path=https://***@host.org/x?y=1"),
        ("data.path=https://hunter2@host.org", "data.path=https://***@host.org"),
        ("data.path=https://me:p@hunter2@host.org/x@y", "data.path=https://***@host.org/x@y"),
        ("data.path=https://host.org/x?token=hunter2&y=1", "data.path=https://host.org/x?token=***&y=1"),
        ("name=token=hunter2", "name=token=***"),
        ("      WANDB_API_KEY: hunter2", "      WANDB_API_KEY: ***"),
    ],
)  # fmt: skip
def test_secrets_are_masked_and_the_rest_is_kept(text, kept):
    assert redact(text) == kept


@pytest.mark.parametrize(
    "text",
    ["tokens_per_step=256", "micro_batch_tokens=128", "data.path=user@host:/tokens/x", "attention=cosine", "lr=1e-3",
     "name=secretary", "data.path=/home/me/password/x", "name=a@b", "tokenizer=bytes", "compressors=true", "-m"],
)  # fmt: skip
def test_what_is_no_secret_is_kept(text):
    assert redact(text) == text


def test_words_and_trees_are_masked():
    assert redact_words(["--api-key", SECRET, "-m", "lr=1"]) == ["--api-key", "***", "-m", "lr=1"]
    tree = {
        "run": {"command": f"x api_key={SECRET}", "wandb_api_key": SECRET, "tokens_per_step": 256},
        "tags": [1, "a"],
    }
    kept = {"run": {"command": "x api_key=***", "wandb_api_key": "***", "tokens_per_step": 256}, "tags": [1, "a"]}
    assert redact_tree(tree) == kept


class Recording:
    """A logger that keeps what it is given."""

    def __init__(self, run_dir, resume_step, wandb_id):
        del run_dir, resume_step, wandb_id
        self.command = list(sys.argv)

    def log_hyperparams(self, values):
        self.values = values


def recording(run_dir, resume_step, wandb_id):
    """Its builder."""
    return [Recording(run_dir, resume_step, wandb_id)]


def begun(config, folder, **record):
    """A run that has its folder."""
    processes = find_processes(devices=1, num_nodes=1)
    return Run(config, "run", processes, folder=folder, record={"wandb_id": "x", **record})


def test_a_command_is_one_that_a_shell_takes(monkeypatch):
    words = [benchmark.__file__, "--contenders", "ours", "SDPA cudnn, no norm"]
    monkeypatch.setattr(sys, "argv", words)
    assert environment()["command"] == "python -m scripts.benchmark --contenders ours 'SDPA cudnn, no norm'"
    monkeypatch.setattr(sys, "argv", ["/usr/bin/pytest", "a b"])
    assert environment()["command"] == "/usr/bin/pytest 'a b'"


def test_a_run_on_the_cpu_is_of_the_cpu_also_where_there_is_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert environment()["device"] == environment(cuda=True)["device"] == "a GPU"
    assert environment(cuda=False)["device"].endswith("cores")


def test_neither_the_record_nor_a_logger_sees_a_secret(tmp_path, monkeypatch):
    words = [train.__file__, "lr=1e-3", f"+hydra.job.env_set.WANDB_API_KEY={SECRET}", "seed=1"]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setitem(BUILDERS["logger"], "csv", "test_secrets.recording")
    config = validate(configure("logger=csv", "data=file", f"data.path=https://me:{SECRET}@host.org/x"))
    record = environment()
    assert record["command"] == "python train.py lr=1e-3 '+hydra.job.env_set.WANDB_API_KEY=***' seed=1"
    run = begun(config, tmp_path, command=record["command"], error=f"token={SECRET}")
    with train.loggers_of(config, run) as (logger,):
        assert SECRET not in repr(logger.command) + repr(logger.values)
        assert logger.values["data"]["path"] == "https://***@host.org/x" and logger.values["lr"] == 1e-3
    assert config.data.path == f"https://me:{SECRET}@host.org/x"  # what is built has it
    with redacted_command_line():
        assert sys.argv[1] == "lr=1e-3" and sys.argv[2].endswith("=***")
    assert sys.argv is words


@pytest.mark.parametrize(
    ("stopped", "ends"),
    [
        (DivergedError("the loss is nan"), {"status": "diverged", "error": "the loss is nan"}),
        (OSError("a disk\nis full"), {"status": "failed", "error": "a disk"}),
        (OSError(f"no https://me:{SECRET}@host"), {"status": "failed", "error": "no https://***@host"}),
        (Interrupted(15, 3), {"status": "interrupted", "error": None}),
        (KeyboardInterrupt(), {"status": "interrupted", "error": None}),
    ],
    ids=str,
)
def test_a_logger_hears_how_the_run_ended_and_not_that_it_runs(tmp_path, monkeypatch, stopped, ends):
    monkeypatch.setitem(BUILDERS["logger"], "csv", "test_secrets.recording")
    heard = []
    monkeypatch.setattr(train, "finish", lambda _, **how: heard.append(how))
    ends_before = {"status": "running", "error": None, "ended": None, "wall_seconds": 9.5}
    run = begun(validate(configure("logger=csv")), tmp_path, **ends_before)
    with pytest.raises(type(stopped)), train.loggers_of(run.config, run) as (logger,):
        assert not {*ends_before} & {*logger.values["run"]}
        raise stopped
    assert heard == [ends]


def test_a_logger_that_does_not_start_says_so_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(BUILDERS["logger"], "csv", "test_secrets.absent_service")
    config = validate(configure("logger=csv"))
    with (
        pytest.raises(ValueError, match="^logger=csv does not start: no account$"),
        train.loggers_of(config, begun(config, tmp_path)),
    ):
        pass


def absent_service(run_dir, resume_step, wandb_id):
    """A builder that fails in a service's own way."""
    del run_dir, resume_step, wandb_id
    raise RuntimeError("no account")
