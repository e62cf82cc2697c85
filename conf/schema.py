"""Checks a composed configuration: every key known, every value of its type, before anything is built.

The types of a group that names a ``_target_`` are read off that class's own signature, so that a YAML file, the
constructor and the check cannot disagree. Ranges are checked by the constructors.
"""

import dataclasses
import inspect
import typing
from pathlib import Path
from typing import Any

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

CONF = Path(__file__).parent
GROUPS = ("attention", "norm", "model", "data", "optimizer", "trainer", "logger")
OVERRIDING = ("experiment", "debug", "sweep")  # groups that choose options of the others, and values


class ConfigError(ValueError):
    """A key of the configuration is unknown, missing or of the wrong type."""


@dataclasses.dataclass
class TopLevel:
    """The knobs of conf/config.yaml itself; each is explained there."""

    seq_len: int
    max_steps: int
    tokens_per_step: int
    micro_batch_tokens: int | None
    lr: float
    seed: int
    compile: bool | None
    test: bool
    compressors: bool
    resume: str | None
    name: str | None
    run_root: str


@dataclasses.dataclass
class TrainerOptions:
    """conf/trainer/default.yaml, which explains each."""

    accelerator: str
    devices: int
    precision: str | None
    clip_norm: float | None
    val_every: int
    val_bytes: int | None
    log_every: int
    sample_bytes: int
    progress_bar: bool
    deterministic: bool
    overfit: bool
    profile_steps: int
    data_on_device: bool


def validate(config: DictConfig) -> DictConfig:
    """The configuration with every reference resolved and every value converted to its type.

    Raises:
        ConfigError: naming the key, what it got and what is accepted.
    """
    values = OmegaConf.to_container(config, resolve=True)
    # these only choose and override; they hold nothing of their own
    top = {key: value for key, value in values.items() if key not in (*GROUPS, *OVERRIDING)}
    checked = _check(TopLevel, top, prefix="")
    for group in GROUPS:
        if not isinstance(values.get(group), dict):
            raise ConfigError(f"{group} must be an option of conf/{group}/, got {values.get(group)!r}")
        checked[group] = _check_group(group, values[group])
    if not 0 <= checked["seed"] < 2**32:
        raise ConfigError(f"seed must be an integer from 0 to 2**32 - 1, got {checked['seed']}")
    return OmegaConf.create(checked)


def _check_group(group: str, values: dict[str, Any]) -> dict[str, Any]:
    if group == "trainer":
        return _check(TrainerOptions, values, prefix="trainer.")
    special = {key: values[key] for key in ("_target_", "_partial_") if key in values}
    if "_target_" not in special:
        raise ConfigError(f"{group}._target_ is missing; accepted: the options in conf/{group}/")
    arguments = {key: value for key, value in values.items() if key not in special}
    schema = _signature_schema(group, special["_target_"], given_by_code=GIVEN_BY_CODE[group])
    return {**special, **_check(schema, arguments, prefix=f"{group}.")}


# Constructor arguments that the program supplies itself: no keys of the configuration.
GIVEN_BY_CODE = {
    "attention": ("num_heads", "head_dim"),
    "norm": ("width", "num_layers", "attention", "mlp"),
    "model": ("attention", "block"),
    "data": (),
    "optimizer": (),
    "logger": ("run_dir", "resume_step", "wandb_id"),
}


def _signature_schema(group: str, target: str, given_by_code: tuple[str, ...]) -> type:
    """A dataclass with the typed arguments of the target."""
    try:
        function = get_object(target)
    except Exception as error:
        raise ConfigError(f"{group}._target_={target!r} cannot be imported: {error}") from error
    signature = inspect.signature(function, eval_str=True)
    fields = []
    for name, parameter in signature.parameters.items():
        if name in given_by_code:
            continue
        annotation = Any if parameter.annotation is inspect.Parameter.empty else parameter.annotation
        if parameter.default is inspect.Parameter.empty:
            fields.append((name, annotation))
        else:
            fields.append((name, annotation, dataclasses.field(default=parameter.default, kw_only=True)))
    return dataclasses.make_dataclass(f"{group}_arguments", fields, kw_only=True)


def _check(schema: type, values: dict[str, Any], prefix: str) -> dict[str, Any]:
    typed = OmegaConf.structured(schema)
    fields = {field.name: field for field in dataclasses.fields(schema)}
    for key, value in values.items():
        if key not in fields:
            raise ConfigError(f"{prefix}{key} is not a key; accepted: {', '.join(prefix + name for name in fields)}")
        try:
            typed[key] = value
        except OmegaConfBaseException as error:
            raise ConfigError(f"{prefix}{key} must be {_name(fields[key].type)}, got {value!r}") from error
    missing = [prefix + key for key in fields if OmegaConf.is_missing(typed, key)]
    if missing:
        raise ConfigError(f"{', '.join(missing)} must be given, e.g. {missing[0]}=VALUE")
    return OmegaConf.to_container(typed)


def _name(annotation: Any) -> str:
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    if annotation in names:
        return names[annotation]
    if typing.get_origin(annotation) is list:
        return "a list, each entry " + _name(typing.get_args(annotation)[0])
    if typing.get_args(annotation):
        return " or ".join(_name(part) for part in typing.get_args(annotation))
    return str(annotation)


def check_mode(config: DictConfig, choices: dict[str, str], *, multirun: bool) -> None:
    """Refuses what would silently do something else than it says.

    Raises:
        ConfigError: a sweep without -m, or -m with several processes a job.
    """
    if choices.get("sweep") and not multirun:
        raise ConfigError(f"sweep={choices['sweep']} needs -m: python train.py -m sweep={choices['sweep']}")
    if multirun and config.trainer.devices > 1:
        # Lightning starts the other processes with this one's arguments: each would run the whole sweep again
        raise ConfigError(f"-m runs jobs with trainer.devices=1, got {config.trainer.devices}")


def hints(arguments: list[str]) -> list[str]:
    """For every KEY=VALUE on a command line whose key is none, a line that says which are.

    Hydra refuses an unknown key before the program sees it and names it, but not what is accepted.
    """
    top = [field.name for field in dataclasses.fields(TopLevel)]
    lines = []
    for argument in arguments:
        key = argument.split("=", 1)[0]
        group, _, rest = key.partition(".")
        if "=" not in argument or key.startswith(("hydra", "+", "~", "-")):
            continue
        if group not in (*top, *GROUPS, *OVERRIDING):
            lines.append(f"{key} is not a key; accepted: {', '.join((*top, *GROUPS, *OVERRIDING))}\n")
        elif rest and group in GROUPS:
            options = {path.stem: list(OmegaConf.load(path)) for path in sorted((CONF / group).glob("*.yaml"))}
            if not any(rest.split(".")[0] in keys for keys in options.values()):
                known = "; ".join(f"{option}: {', '.join(keys)}" for option, keys in options.items())
                lines.append(f"{key} is not a key; {group} accepts {known}\n")
    return lines
