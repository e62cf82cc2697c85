"""A trained model out of its run's folder."""

from pathlib import Path

import torch
from omegaconf import DictConfig

from conf.schema import builder, check_stored
from models.gpt import GPT
from models.training.checkpoint_files import BEST_CHECKPOINT, CHECKPOINT_FOLDER, LAST_CHECKPOINT, read_checkpoint
from models.training.run_files import CONFIG_FILE, file_of_run, load_config


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
    path = Path(folder) / CHECKPOINT_FOLDER / names[checkpoint] if checkpoint in names else Path(checkpoint)
    if not path.is_file():
        existing = [name for name, file in names.items() if (Path(folder) / CHECKPOINT_FOLDER / file).is_file()]
        raise ValueError(
            f"checkpoint must be best, last or the path of a checkpoint, got {checkpoint!r}: "
            f"{str(path)!r} is no file; the run has {' and '.join(existing) or 'no checkpoint yet'}"
        )
    return path


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    """What a checkpoint holds under ``gpt.``; the optimizer's state is never read."""
    state = read_checkpoint(path)["state_dict"]
    return {key.removeprefix("gpt."): weight for key, weight in state.items() if key.startswith("gpt.")}


def load_weights(gpt: GPT, source: str | Path) -> list[str]:
    """Warm start: takes over a trained model's weights, and returns the names of those that stay as they started.

    Args:
        gpt: the new model. It may have another length or attention; what both have must have the same shapes.
        source: a run's folder, whose best checkpoint is taken, or a checkpoint.

    Raises:
        ValueError: source is neither, or its weights are of another width, depth or number of heads.
    """
    path = Path(source)
    path = find_checkpoint(path, "best") if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"init_from must be null, a run's folder or a checkpoint, got {str(source)!r}")
    weights, own = _read_weights(path), gpt.state_dict()
    # What an attention has of its own, and a table of absolute positions, belong to the old attention and length.
    special = tuple(name for name in {*weights, *own} if ".inner." in name or name.startswith("positions."))
    wrong = [
        f"{name} {tuple(weights[name].shape) if name in weights else 'missing'}, here "
        f"{tuple(own[name].shape) if name in own else 'missing'}"
        for name in sorted({*weights, *own} - set(special))
        if name not in weights or name not in own or weights[name].shape != own[name].shape
    ]
    if wrong:
        differ = f"{wrong[0]}, and {len(wrong) - 1} more" if len(wrong) > 1 else wrong[0]
        raise ValueError(f"init_from={str(source)!r} has the weights of another model: {differ}")
    taken = {name: weights[name] for name in own if name in weights and weights[name].shape == own[name].shape}
    gpt.load_state_dict(taken, strict=False)
    return sorted(set(own) - set(taken))
