"""A run's config.yaml, read as data that a stranger may have written."""

import re
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf.earlier import brought_up_to_date
from conf.registry import BUILDERS, FORMER_TARGETS
from conf.schema import ConfigError, shown


def read_stored(path: Path) -> DictConfig:
    """The configuration that a run stored. Its groups are not checked yet: ``schema.builder`` does.

    It was stored resolved: a reference in it was put there by hand, and could read the environment of who opens it.

    Raises:
        ConfigError: naming the file, and what in it a stored configuration does not have.
    """
    try:
        for event in yaml.parse(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):  # nine lines of aliases can stand for 10^9 values
                raise ConfigError(f"{str(path)!r} refers to the anchor {shown(event.anchor)}; accepted: plain values")
        config = OmegaConf.load(path)
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException, RecursionError) as error:
        raise ConfigError(f"{str(path)!r} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, DictConfig):
        raise ConfigError(f"{str(path)!r} must hold keys and values, got a list")
    values = OmegaConf.to_container(config)
    try:
        _refuse_references(values, prefix="")
        for group in BUILDERS:
            if isinstance(values.get(group), dict) and "_target_" in values[group]:
                values[group] = _translate(group, values[group])
        return brought_up_to_date(OmegaConf.create(values))
    except ValueError as error:
        raise ConfigError(f"{str(path)!r}: {error}") from error


def _refuse_references(tree: Any, prefix: str) -> None:
    if isinstance(tree, dict):
        for key, value in tree.items():
            _refuse_references(value, f"{prefix}{key}.")
    elif isinstance(tree, list):
        for index, value in enumerate(tree):
            _refuse_references(value, f"{prefix}{index}.")
    elif isinstance(tree, str) and "${" in tree:
        raise ConfigError(f"{_key(prefix)} must be a value, got the reference {shown(tree)}")


def _translate(group: str, options: dict[str, Any]) -> dict[str, Any]:
    """An option of an earlier run, which named what was imported, under the kind that this was."""
    target = options["_target_"]
    known, kind = FORMER_TARGETS.get(target, (None, None)) if isinstance(target, str) else (None, None)
    if known != group:
        raise ConfigError(f"{group} must be of kind {', '.join(BUILDERS[group])}; got _target_ {shown(target)}")
    return {"kind": kind, **{key: value for key, value in options.items() if key not in ("_target_", "_partial_")}}


def _key(prefix: str) -> str:
    key = prefix.removesuffix(".")
    return key if re.fullmatch(r"[\w.]+", key) else shown(key)
