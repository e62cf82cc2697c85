"""The private parts of Lightning that are used: where a release lacks one, this says which, and what it was for."""

import inspect
import re
from pathlib import Path

import lightning
import pytest
from lightning.pytorch.loggers import WandbLogger

ROOT = Path(__file__).parent.parent
# As the code writes them: where they are looked for, and what they are used for.
PRIVATE = {
    "trainer.fit_loop.epoch_loop._should_accumulate": "models/training/callbacks.py: whether a micro-batch ends a step",
    "trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor": "models/training/trainer.py: replaced: it waits for a GPU",
    "trainer._signal_connector": "models/training/trainer.py: replaces register_signal_handlers, whose handler waits",
    "logger._wandb_init": "models/training/loggers.py: an argument that wandb warns of is taken out",
}


@pytest.fixture
def trainer(tmp_path):
    off = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return lightning.Trainer(accelerator="cpu", default_root_dir=tmp_path, **off)


def missing(name, purpose):
    return f"Lightning {lightning.__version__} has no {name}, which is used in {purpose}; find what took its place"


def test_lightning_still_registers_its_handlers_where_that_is_replaced(trainer):
    connector = getattr(trainer, "_signal_connector", None)
    register = getattr(connector, "register_signal_handlers", None)
    assert callable(register), missing("trainer._signal_connector", PRIVATE["trainer._signal_connector"])
    assert "self._signal_connector.register_signal_handlers()" in inspect.getsource(lightning.Trainer._run)


@pytest.mark.parametrize("name", [name for name in PRIVATE if name.startswith("trainer.fit_loop")])
def test_lightning_still_has_what_is_used_of_its_trainer(trainer, name):
    *path, private = name.split(".")[1:]
    owner = trainer
    for part in path:
        owner = getattr(owner, part)
    assert callable(getattr(owner, private, None)), missing(name, PRIVATE[name])
    assert not inspect.signature(getattr(owner, private)).parameters, f"{name}() now takes arguments"


def test_lightning_asks_for_a_sigterm_where_it_is_replaced():
    from lightning.pytorch.loops import training_epoch_loop

    source = inspect.getsource(training_epoch_loop._TrainingEpochLoop)
    assert re.search(r"self\._broadcast_sigterm_tensor\(\)", source), (
        f"Lightning {lightning.__version__} no longer calls _broadcast_sigterm_tensor(): replacing it has no effect, "
        "and what took its place may wait for the GPU at every micro-batch"
    )


def test_lightning_watches_the_processes_that_it_starts_by_a_method_that_can_be_replaced():
    from lightning.fabric.strategies.launchers import subprocess_script

    observer = subprocess_script._ChildProcessObserver(main_pid=0, child_processes=[])
    place = "end_started in models/training/processes.py"
    said = f"Lightning {lightning.__version__} watches processes another way: see {place}"
    assert observer.name == "child-process-observer" and callable(getattr(observer, "_run", None)), said
    assert "self._run()" in inspect.getsource(subprocess_script._ChildProcessObserver.run), said


def test_lightning_still_keeps_wandbs_arguments(tmp_path):
    logger = WandbLogger(save_dir=tmp_path, offline=True, id="an-id")
    arguments = getattr(logger, "_wandb_init", None)
    assert isinstance(arguments, dict), missing("WandbLogger._wandb_init", PRIVATE["logger._wandb_init"])
    assert arguments["id"] == "an-id"


def test_no_other_private_part_is_used():
    """Of Lightning's objects, as this code calls them. Add what is new to PRIVATE, with a test."""
    used = set()
    for path in (ROOT / "train.py", *(ROOT / "models").rglob("*.py"), *(ROOT / "data").glob("*.py")):
        for name in re.findall(r"\b((?:self\.)?(?:trainer|logger)(?:\.\w+)*\._\w+)", path.read_text()):
            used.add(name.removeprefix("self."))
        private = r"^from (lightning\S*\._\S*) import|^from lightning\S* import .*\b(_\w+)"
        imported = re.findall(private, path.read_text(), re.MULTILINE)
        assert not imported, (path, imported)
    assert used == set(PRIVATE)
