"""A trained model out of its run's folder."""

import logging
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from conf.schema import builder, check_stored
from models.attention import hold_scales, largest_log_scale, try_backend
from models.gpt import GPT
from models.training.checkpoint_files import BEST_CHECKPOINT, CHECKPOINT_FOLDER, LAST_CHECKPOINT, read_checkpoint
from models.training.run_files import CONFIG_FILE, file_of_run, load_config

log = logging.getLogger(__name__)

# Keys without which a model's weights are no model's, though their shapes are the same.
ONE_MEANING = ("model.num_heads", "model.num_kv_heads", "model.tied_head")


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
    gpt, config, _ = read_model(folder, checkpoint, device)
    return gpt, config


def read_model(
    folder: str | Path, checkpoint: str = "best", device: torch.device | str | None = None
) -> tuple[GPT, DictConfig, int]:
    """What ``load_model`` returns, and the step that the weights are of: a run that goes on replaces its checkpoints,
    so that a second look at the file may find another step's.
    """
    path = find_checkpoint(folder, checkpoint)
    config_path = Path(folder) / CONFIG_FILE
    config = load_config(folder)
    try:
        config = _served(check_stored(config), device or "cpu")
        gpt = build_gpt(config)
    except ValueError as error:
        raise ValueError(f"{str(config_path)!r} does not describe a model: {error}") from error
    weights, step = _read_weights(path)
    try:
        gpt.load_state_dict(weights)
    except RuntimeError as error:  # strict: every weight is there and no other
        raise ValueError(
            f"{str(path)!r} holds the weights of another model than {str(config_path)!r}: {error}"
        ) from error
    return gpt.to(device or "cpu").eval(), config, step


def _served(config: DictConfig, device: torch.device | str) -> DictConfig:
    """The configuration, with attention.backend=auto where the run's own cannot serve: weights are of no back end."""
    try:
        try_backend(config.attention.get("backend"), device)
    except ValueError as error:
        log.warning("attention.backend is auto here, for the run's own cannot serve: %s", error)
        config.attention.backend = "auto"
    return config


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


def _read_weights(path: Path) -> tuple[dict[str, torch.Tensor], int]:
    """What a checkpoint holds under ``gpt.``, and its step; the optimizer's state is never read."""
    checkpoint = read_checkpoint(path)
    state = {key: weight for key, weight in checkpoint["state_dict"].items() if key.startswith("gpt.")}
    return {key.removeprefix("gpt."): weight for key, weight in state.items()}, checkpoint["global_step"]


def load_weights(gpt: GPT, source: str | Path) -> list[str]:
    """Warm start: takes over a trained model's weights, and returns what to know of them, as "WHAT: NAMES".

    That is which of the new model's weights stay as they started, which of the trained ones it has no place for, and
    which learned scales were above the bound that they have here, and are now held at it.

    Args:
        gpt: the new model. It may have another length or attention; what both have must have the same shapes.
        source: a run's folder, whose best checkpoint is taken, or a checkpoint.

    Raises:
        ValueError: source is neither, or its weights are of another width or depth. Of what shapes do not say, such as
            the number of heads, see ``meant_otherwise``.
    """
    (weights, _), own = _read_weights(source_checkpoint(source)), gpt.state_dict()
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
    notes = {
        "as they start": set(own) - set(taken),
        "left behind": set(weights) - set(own),
        "held at their bound": _hold_scales(gpt),
    }
    return [f"{what}: {', '.join(sorted(names))}" for what, names in notes.items() if names]


def _hold_scales(gpt: GPT) -> set[str]:
    """As training does before a step; returns the names of those that were above their bound."""
    modules = {f"{name}.log_scale": module for name, module in gpt.named_modules()}
    learned = {name: module for name, module in modules.items() if getattr(module, "log_scale", None) is not None}
    above = {name for name, inner in learned.items() if inner.log_scale.max() > largest_log_scale(inner.max_scale)}
    hold_scales(learned.values())
    return above


def meant_otherwise(source: str | Path, config: DictConfig) -> list[str]:
    """What to know of how a warm start's weights will be used: what they were trained with that is otherwise now, as
    "KEY was X, is Y", another activation, say; and that attention.scale has no effect, where another was given and
    learned scales are taken. Nothing if the configuration of the source is not known: a checkpoint alone was moved
    away.

    Raises:
        ValueError: source is no run or checkpoint, or its weights would mean something else altogether: with the same
            shapes, but other heads, or another head of the model.
    """
    path = source_checkpoint(source)
    folder = path.parent.parent
    if path.parent.name != CHECKPOINT_FOLDER or not (folder / CONFIG_FILE).is_file():
        return []
    trained = load_config(folder)
    theirs, ours = _used_as(trained), _used_as(config)
    both = [key for key in theirs if key in ours]  # kinds of attention have keys of their own
    changed = {key: f"{key} was {theirs[key]!r}, is {ours[key]!r}" for key in both if theirs[key] != ours[key]}
    refused = [text for key, text in changed.items() if key in ONE_MEANING]
    if refused:
        raise ValueError(f"init_from={str(source)!r} has the weights of another model: {', '.join(refused)}")
    notes = [f"used otherwise than they were trained: {', '.join(changed.values())}"] if changed else []
    old, new = trained.attention, config.attention
    if old.get("learned_scale") and new.get("learned_scale") and old.get("scale") != new.get("scale"):
        notes.append(f"attention.scale={new.get('scale')} has no effect: learned scales go on from what they are")
    return notes


def _used_as(config: DictConfig) -> dict[str, Any]:
    """How a model uses its weights, where their shapes do not say it."""
    model = config.model
    # What computes an attention says nothing of what it is; neither does what a learned scale once started from.
    quiet = ("kind", "backend", "scale" if config.attention.get("learned_scale") else None)
    options = {f"attention.{key}": value for key, value in config.attention.items() if key not in quiet}
    return {
        "model.num_heads": model.num_heads,
        "model.num_kv_heads": model.num_kv_heads or model.num_heads,
        "model.tied_head": model.tied_head,
        "model.positions": model.positions,
        "model.activation": model.activation,
        "norm": config.norm.kind,
        "attention": config.attention.kind,
        **options,
    }


def source_checkpoint(source: str | Path) -> Path:
    """The checkpoint that init_from means: of a run's folder its best one. ValueError: there is none."""
    path = Path(source)
    path = find_checkpoint(path, "best") if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"init_from must be null, a run's folder or a checkpoint, got {str(source)!r}")
    return path
