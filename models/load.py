"""A trained model out of its run's folder."""

from pathlib import Path

import torch
from omegaconf import DictConfig

from conf.schema import builder, check_stored
from models.gpt import GPT
from models.runs import CONFIG_FILE, file_of_run, load_config, read_checkpoint
from models.trainer import BEST_CHECKPOINT, LAST_CHECKPOINT


def build_gpt(config: DictConfig) -> GPT:
    """The model that a configuration describes, freshly initialised."""
    return builder(config, "model")(attention=builder(config, "attention"), block=builder(config, "norm"))


def load_model(
    folder: str | Path, checkpoint: str = "best", device: torch.device | str | None = None
) -> tuple[GPT, DictConfig]:
    """The trained model of a run, in evaluation mode, and the run's configuration.

    Args:
        folder: the run's folder.
        checkpoint: "best", "last" or the path of a checkpoint.
        device: where the model goes, None for the CPU.

    Raises:
        ValueError: folder is no run, or its checkpoint is missing, damaged or another model's.
    """
    path = find_checkpoint(folder, checkpoint)
    config_path = Path(folder) / CONFIG_FILE
    config = load_config(folder)
    try:
        config = check_stored(config)
        gpt = build_gpt(config)
    except ValueError as error:
        raise ValueError(f"{str(config_path)!r} does not describe a model: {error}") from error
    try:
        gpt.load_state_dict(_read_weights(path))
    except RuntimeError as error:  # strict: every weight is there and no other
        raise ValueError(
            f"{str(path)!r} holds the weights of another model than {str(config_path)!r}: {error}"
        ) from error
    return gpt.to(device or "cpu").eval(), config


def find_checkpoint(folder: str | Path, checkpoint: str) -> Path:
    """The path of a run's checkpoint "best" or "last", or of any other given by its path."""
    file_of_run(folder, CONFIG_FILE)
    names = {"best": BEST_CHECKPOINT, "last": LAST_CHECKPOINT}
    path = Path(folder) / "checkpoints" / names[checkpoint] if checkpoint in names else Path(checkpoint)
    if not path.is_file():
        existing = [name for name, file in names.items() if (Path(folder) / "checkpoints" / file).is_file()]
        raise ValueError(
            f"checkpoint must be best, last or the path of a checkpoint, got {checkpoint!r}: "
            f"{str(path)!r} is no file; the run has {' and '.join(existing) or 'no checkpoint yet'}"
        )
    return path


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    """What a checkpoint holds under ``gpt.``; the optimizer's state is never read."""
    state = read_checkpoint(path)["state_dict"]
    return {key.removeprefix("gpt."): weight for key, weight in state.items() if key.startswith("gpt.")}
