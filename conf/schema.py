"""Checks a composed configuration: every key known, every value of its type, before anything is built.

The types of a group that names a ``kind`` are read off the signature of what it builds, so that a YAML file, the
constructor and the check cannot disagree. Ranges are checked by the constructors.
"""

import dataclasses
import functools
import inspect
import math
import re
import shlex
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf.registry import BUILDERS, GIVEN_BY_CODE, find

CONF = Path(__file__).parent
GROUPS = ("attention", "norm", "model", "data", "optimizer", "trainer", "logger")
# Groups that choose options of the others, and override values; they hold no keys of their own.
CHOOSERS = ("experiment", "debug", "sweep")
# Keys of options that are references to a key above them, which is the one to set.
COPIES = {"optimizer.lr": "lr", "optimizer.max_steps": "max_steps", "model.seq_len": "seq_len"}
# Keys that are looked for in a group that does not have them: where they are.
ELSEWHERE = {"attention.position": "model.positions", "attention.positions": "model.positions"}


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
    init_from: str | None
    name: str | None
    run_root: str


@dataclasses.dataclass
class TrainerOptions:
    """conf/trainer/default.yaml, which explains each."""

    accelerator: str
    devices: int
    num_nodes: int
    precision: str | None
    clip_norm: float | None
    val_every: int
    checkpoint_every: int | None
    checkpoint_minutes: float | None
    keep_checkpoints: int
    val_bytes: int | None
    log_every: int
    sample_bytes: int
    progress_bar: bool
    deterministic: bool
    overfit: bool
    profile_steps: int
    data_on_device: bool
    budget_minutes: float | None


def validate(config: DictConfig) -> DictConfig:
    """The configuration with every reference resolved and every value converted to its type.

    Raises:
        ConfigError: naming the key, what it got and what is accepted.
    """
    try:
        values = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        key = f"{error.full_key}: " if error.full_key else ""
        raise ConfigError(key + str(error.msg or error).strip().split("\n", 1)[0]) from error
    # these only choose and override; they hold nothing of their own
    top = {key: value for key, value in values.items() if key not in (*GROUPS, *CHOOSERS)}
    checked = _check(TopLevel, top, prefix="")
    for group in GROUPS:
        checked[group] = check_group(group, values.get(group))
    _check_copies(checked)
    if not 0 <= checked["seed"] < 2**32:
        raise ConfigError(f"seed must be an integer from 0 to 2**32 - 1, got {checked['seed']}")
    return OmegaConf.create(checked)


def _check_copies(checked: dict[str, Any]) -> None:
    """A copy of another value would train by it what the run's name, its identity and comparisons say of the source."""
    for key, source in COPIES.items():
        group, _, name = key.partition(".")
        value = checked[group].get(name, checked[source])
        if value != checked[source]:
            raise ConfigError(f"{key} follows {source} = {checked[source]}, got {shown(value)}: give {source} alone")


def check_stored(config: DictConfig) -> DictConfig:
    """What describes the model in the configuration of a run, checked as by ``validate``, and the rest of it.

    The run may be another version's: of top-level and trainer keys it may have fewer, or more, which are left out.

    Raises:
        ConfigError: as ``validate``.
    """
    values = OmegaConf.to_container(config)
    checked = {**values, **_check_known(TopLevel, values, prefix="")}
    checked["trainer"] = _check_known(TrainerOptions, values.get("trainer"), prefix="trainer.")
    for group in ("attention", "norm", "model"):
        checked[group] = check_group(group, values.get(group))
    read = {"seq_len": checked, "micro_batch_tokens": checked, "precision": checked["trainer"]}  # by the scripts
    missing = [key for key, keys in read.items() if keys[key] == "???"]
    if missing:
        raise ConfigError(f"{missing[0]} is missing")
    return OmegaConf.create(checked)


def check_group(group: str, values: Any) -> dict[str, Any]:
    """The keys of one group, each converted to its type.

    Raises:
        ConfigError: naming the key, what it got and what is accepted.
    """
    if isinstance(values, DictConfig):
        values = OmegaConf.to_container(values)
    if not isinstance(values, dict):
        raise ConfigError(f"{group} must be one of {', '.join(options_of(group))} (conf/{group}/), got {shown(values)}")
    if group == "trainer":
        return _check(TrainerOptions, values, prefix="trainer.")
    kind = values.get("kind")
    if not isinstance(kind, str) or kind not in BUILDERS[group]:
        got = f"got {shown(kind)}" if "kind" in values else "it is missing"
        raise ConfigError(f"{group}.kind must be one of {', '.join(BUILDERS[group])}; {got}")
    arguments = {key: value for key, value in values.items() if key != "kind"}
    return {"kind": kind, **_check(_signature_schema(group, kind), arguments, prefix=f"{group}.")}


def builder(config: DictConfig, group: str) -> Callable[..., Any]:
    """What builds a group's option, its keys filled in: called with what GIVEN_BY_CODE lists for the group.

    Raises:
        ConfigError: the option is none of conf/, or has a wrong key or value.
    """
    arguments = check_group(group, config.get(group))
    return functools.partial(find(group, arguments.pop("kind")), **arguments)


def _signature_schema(group: str, kind: str) -> type:
    """A dataclass with the typed arguments of what the kind builds."""
    signature = inspect.signature(find(group, kind), eval_str=True)
    fields = []
    for name, parameter in signature.parameters.items():
        if name in GIVEN_BY_CODE[group]:
            continue
        annotation = Any if parameter.annotation is inspect.Parameter.empty else parameter.annotation
        if parameter.default is inspect.Parameter.empty:
            fields.append((name, annotation))
        else:
            fields.append((name, annotation, dataclasses.field(default=parameter.default, kw_only=True)))
    return dataclasses.make_dataclass(f"{group}_arguments", fields, kw_only=True)


def _check(schema: type, values: dict[str, Any], prefix: str, *, partial: bool = False) -> dict[str, Any]:
    typed = OmegaConf.structured(schema)
    fields = {field.name: field for field in dataclasses.fields(schema)}
    for key, value in values.items():
        if key not in fields:
            raise ConfigError(unknown(prefix, key, list(fields)))
        try:
            if not _plain(fields[key].type, value):
                raise ValueError("OmegaConf would convert it")
            typed[key] = value
        except (OmegaConfBaseException, ValueError, OverflowError) as error:
            raise ConfigError(f"{prefix}{key} must be {_name(fields[key].type)}, got {shown(value)}") from error
    missing = [prefix + key for key in fields if OmegaConf.is_missing(typed, key)]
    if missing and not partial:
        raise ConfigError(f"{', '.join(missing)} must be given, e.g. {missing[0]}=VALUE")
    return OmegaConf.to_container(typed)


def _check_known(schema: type, values: Any, prefix: str) -> dict[str, Any]:
    known = {field.name for field in dataclasses.fields(schema)}
    values = values if isinstance(values, dict) else {}
    return _check(schema, {key: value for key, value in values.items() if key in known}, prefix, partial=True)


def _plain(annotation: Any, value: Any) -> bool:
    """Whether the value means what it says: OmegaConf takes true for the number 1, and numbers that are none."""
    if isinstance(value, list):
        return typing.get_origin(annotation) is list and all(_plain(typing.get_args(annotation)[0], v) for v in value)
    accepted = typing.get_args(annotation) or (annotation,)
    if value is None or isinstance(value, dict):
        return value is None and type(None) in accepted
    if isinstance(value, bool):
        return bool in accepted
    if float in accepted:
        return math.isfinite(float(value))
    return bool not in accepted or isinstance(value, str) or value in (0, 1)


def unknown(prefix: str, key: str, accepted: list[str]) -> str:
    """What is said of a key that the chosen option does not have: whose key it is, or which there are."""
    full_key, group = f"{prefix}{key}", prefix.removesuffix(".")
    if not re.fullmatch(r"[\w.]+", full_key):
        full_key = shown(full_key)
    owners = [option for option in options_of(group) if key in keys_of(group, option)] if group in GROUPS else []
    if owners and key != "kind":
        owned = f"{full_key} is a key of {' and '.join(f'{group}={owner}' for owner in owners)}"
        return f"{owned}; the chosen option has {', '.join(prefix + name for name in accepted) or 'none'}"
    if full_key in ELSEWHERE:
        return f"{full_key} is not a key: it is {ELSEWHERE[full_key]}, the same for every option of {group}"
    return f"{full_key} is not a key; accepted: {', '.join(prefix + name for name in accepted) or 'none'}"


def options_of(group: str) -> list[str]:
    """The options of a group: the YAML files in its folder."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def keys_of(group: str, option: str) -> list[str]:
    """The keys that an option's file has, without its kind."""
    return [key for key in values_of(group, option) if key != "kind"]


@functools.cache
def values_of(group: str, option: str) -> dict[str, Any]:
    """What an option's file says, references as they stand there; nothing of an option that there is not."""
    if option not in options_of(group):
        return {}
    return OmegaConf.to_container(OmegaConf.load(CONF / group / f"{option}.yaml"))


def shown(value: Any) -> str:
    """A value in a message: quoted, on one line, cut where it is long."""
    text = str(value).lower() if isinstance(value, bool) else "null" if value is None else repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def typed(key: str, value: Any) -> str:
    """KEY=VALUE as it is typed in a shell, whatever characters the value has."""
    text = str(value)
    plain = re.fullmatch(r"[A-Za-z0-9_./@%+-]+", text)
    if plain and ("/" in text or (text[0].isalpha() and text.lower() not in ("null", "true", "false", "inf", "nan"))):
        return f"{key}={text}"
    escaped = re.sub(r'(\\*)("|\Z)', lambda match: 2 * match[1] + ('\\"' if match[2] else ""), text)
    return shlex.quote(f'{key}="{escaped}"')


def _name(annotation: Any) -> str:
    names = {int: "an integer", float: "a finite number", bool: "true or false", str: "text", type(None): "null"}
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
    if multirun and config.trainer.devices * config.trainer.num_nodes > 1:
        # Lightning starts the other processes with this one's arguments: each would run the whole sweep again
        raise ConfigError(
            f"-m runs jobs with trainer.devices=1 and trainer.num_nodes=1, got trainer.devices="
            f"{config.trainer.devices}, trainer.num_nodes={config.trainer.num_nodes}"
        )
