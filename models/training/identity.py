"""Which run a configuration is: its name, what tells it from others, and what a resumed run may not change."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from conf.earlier import ADDED
from conf.schema import COPIES, typed
from models.training.run_files import load_config, read_record

# Keys that do not change what a run computes: neither compared when it is resumed nor told in its name.
INCIDENTAL = (
    "resume",
    "test",
    "compressors",
    "name",
    "run_root",
    "logger",
    "experiment",
    "debug",
    "sweep",
    "hydra",
    "trainer.accelerator",
    "trainer.progress_bar",
    "trainer.sample_bytes",
    "trainer.val_every",
    "trainer.val_bytes",
    "trainer.log_every",
    "trainer.checkpoint_every",
    "trainer.checkpoint_minutes",
    "trainer.keep_checkpoints",
    "trainer.profile_steps",
    "trainer.data_on_device",
    "data.path",  # what the bytes are is told by their hash
    "data.cache_dir",
    "data.download",
)
# Further keys that a run may be continued with other values of, and be the same run: how long it goes on, and how a
# step is cut into pieces, which changes sums by rounding alone.
CONTINUABLE = (
    "max_steps",
    "optimizer.max_steps",
    "micro_batch_tokens",
    "trainer.devices",
    "trainer.num_nodes",
    "compile",
    "attention.backend",
)
# Of these, where a sweep has several values of one, each is a job of its own; but for what runs are found by anyhow.
FOUND_BY = (
    *("resume", "name", "run_root", "max_steps", "optimizer.max_steps", "trainer.val_bytes"),
    *("data.path", "data.cache_dir", "data.download"),  # by the bytes' hash, wherever they are
)
# What decides the shapes and the meaning of the weights: a checkpoint of another model cannot be continued.
MODEL_KEYS = ("seq_len", "model", "attention", "norm")
MODEL_KEYS_THAT_MAY_CHANGE = ("model.dropout", "attention.backend")
LENGTH_KEYS = ("max_steps", "optimizer.max_steps")  # they stretch a schedule, but for one that goes by time
# Keys that name a file: what a run computes depends on its bytes, wherever they are.
BY_BYTES = ("init_from", "optimizer.rates")
RESUMED_WITH = "resumed_with"  # the entry of run.json that says which keys were changed, and at which steps
HASH = "sha256:"
LONGEST_NAME = 120  # of a folder; file systems take 255 bytes


def default_name(
    config: DictConfig, choices: dict[str, str], overrides: Sequence[str] = (), swept: Sequence[str] = ()
) -> str:
    """A name that says what the run is, of letters, digits, '.', '_' and '-' alone.

    Args:
        config: the configuration.
        choices: the option chosen of every configuration group.
        overrides: the command line's KEY=VALUE; told are those that change what is computed, and those of `swept`.
        swept: keys of which the run's sweep has several values.
    """
    groups = ("attention", "norm", "model", "data")
    parts = [choices[group] for group in ("experiment", "debug") if choices.get(group)]
    parts += [choices.get(group) or "none" for group in groups]
    parts += [f"len{config.seq_len}", f"lr{config.lr:g}", f"seed{config.seed}"]
    told = {*groups, "trainer", "seq_len", "lr", "seed"}
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        quiet = is_one_of(key, (*INCIDENTAL, *CONTINUABLE)) and (
            key not in swept or (key in FOUND_BY and key != "data.path")
        )
        if key not in told and not quiet:
            parts.append(f"{key.rsplit('.', 1)[-1]}{value}")
    return plain_name(parts)


def plain_name(parts: Sequence[str]) -> str:
    """The parts as a folder's name, of letters, digits, '.', '_' and '-' alone, and not too long."""
    name = re.sub(r"[^A-Za-z0-9._]+", "-", "-".join(parts)).strip("-.")
    if len(name) > LONGEST_NAME:
        name = f"{name[: LONGEST_NAME - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return name


def identity_of(config: DictConfig, corpus_sha256: str | None) -> dict[str, Any]:
    """What a run computes: two runs of one identity are one run, begun or continued."""
    values = flat(OmegaConf.to_container(config, resolve=True))
    kept = {key: value for key, value in values.items() if not is_one_of(key, (*INCIDENTAL, *CONTINUABLE))}
    return {**_without_added(dict(sorted(kept.items()))), "corpus": corpus_sha256}


def by_bytes(identity: dict[str, Any], files: dict[str, Path]) -> dict[str, Any]:
    """An identity with the hash of files in place of their paths.

    Args:
        identity: see ``identity_of``.
        files: those that are there, by key of ``BY_BYTES``.
    """
    return {**identity, **{key: HASH + _sha256(path) for key, path in files.items()}}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def is_hash(value: Any) -> bool:
    """Whether an identity has the hash of a file's bytes, and not its path."""
    return isinstance(value, str) and value.startswith(HASH)


def differing_keys(one: dict[str, Any], other: dict[str, Any]) -> set[str]:
    """The keys that two identities have different values of."""
    return {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)}


def apart(config: DictConfig, swept: Sequence[str]) -> dict[str, Any]:
    """Of the keys that an identity leaves out, those that a sweep has several values of, which jobs differ by.

    Args:
        config: a configuration.
        swept: the keys, groups among them.
    """
    values = flat(OmegaConf.to_container(config, resolve=True))
    quiet = [key for key in swept if is_one_of(key, (*INCIDENTAL, *CONTINUABLE)) and key not in FOUND_BY]
    return {key: value for key, value in sorted(values.items()) if is_one_of(key, quiet)}


def _without_added(identity: dict[str, Any]) -> dict[str, Any]:
    """Without the keys that came since and say what was done before them: runs of that time recorded none."""
    return {key: value for key, value in identity.items() if key not in ADDED or value != ADDED[key]}


def recorded_identity(folder: Path) -> dict[str, Any] | None:
    """The identity of a run, or None where its files do not say.

    A run that went on with other values of keys, of more than its length, has an identity that no other has.
    """
    try:
        record = read_record(folder)
        recorded = record.get("identity")
        if recorded and isinstance(recorded, dict):
            identity = _without_added(recorded)
        else:
            identity = identity_of(load_config(folder), (record.get("corpus") or {}).get("sha256"))
    except (ValueError, OSError):
        return None
    mixed = [entry for entry in resumed_with(record) if any(key not in LENGTH_KEYS for key in entry["changed"])]
    return {**identity, RESUMED_WITH: mixed} if mixed else identity


def resumed_with(record: dict[str, Any]) -> list[dict[str, Any]]:
    """What a run.json says of changes: entries of ``step``, from which on, and ``changed``, [before, now] by key."""
    entries = record.get(RESUMED_WITH)
    return [entry for entry in entries if _is_entry(entry)] if isinstance(entries, list) else []


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
        return False
    changed = entry.get("changed")
    return isinstance(changed, dict) and all(isinstance(pair, list) and len(pair) == 2 for pair in changed.values())


def was_stretched(folder: Path) -> bool:
    """Whether a run was resumed with another length, so that its first steps are those of another schedule."""
    return any(key in LENGTH_KEYS for entry in resumed_with(read_record(folder)) for key in entry["changed"])


def changes_of(folder: Path, config: DictConfig, *, step: int | None = None) -> dict[str, tuple[Any, Any]]:
    """Keys whose value is another than in the run: before and now. Copies of a key are not said.

    Args:
        folder: the run's.
        config: what is asked for now.
        step: compare with what the run had at this step; None: when it was last started.
    """
    before = flat(OmegaConf.to_container(load_config(folder)))
    now = flat(OmegaConf.to_container(config, resolve=True))
    keys = {key for values in (before, now) for key in values if not is_said_above(values, key)}
    if step is not None:
        for entry in reversed(resumed_with(read_record(folder))):
            if entry["step"] >= step:
                before |= {key: was for key, (was, _) in entry["changed"].items()}
    keys = [key for key in sorted(keys) if not is_one_of(key, INCIDENTAL)]
    return {key: (before.get(key), now.get(key)) for key in keys if before.get(key) != now.get(key)}


def changing_numbers(changes: dict[str, tuple[Any, Any]], *, timed: bool) -> dict[str, tuple[Any, Any]]:
    """Those of the changes that make a run compute something else, by more than rounding.

    Args:
        changes: before and now, by key.
        timed: the learning rate follows the time, and not the number of steps.
    """
    quiet = CONTINUABLE if timed else tuple(key for key in CONTINUABLE if key not in LENGTH_KEYS)
    quiet = (*quiet, "init_from")  # read where a run begins, never where it goes on
    return {key: change for key, change in changes.items() if not is_one_of(key, quiet)}


def refuse_another(folder: Path, config: DictConfig, identity: dict[str, Any]) -> None:
    """Raises ValueError for a run of another model or optimizer, or whose bytes or splits were others."""
    changed = changes_of(folder, config)

    def say(keys: Sequence[str], but: Sequence[str] = ()) -> str:
        found = {key: change for key, change in changed.items() if is_one_of(key, keys) and key not in but}
        return "; ".join(f"{key} was {before!r}, is {now!r}" for key, (before, now) in found.items())

    if model := say(MODEL_KEYS, MODEL_KEYS_THAT_MAY_CHANGE):
        raise ValueError(
            f"the run in {str(folder)!r} has another model: {model}; give the same keys again, or take its weights "
            f"alone into a new run: {typed('init_from', folder)}"
        )
    if kind := say(("optimizer.kind",)):
        raise ValueError(
            f"the run in {str(folder)!r} has another optimizer, whose state is of no use here: {kind}; give the same "
            f"option again, or take its weights alone into a new run: {typed('init_from', folder)}"
        )
    sha256 = (read_record(folder).get("corpus") or {}).get("sha256")
    if sha256 not in (None, identity["corpus"]):
        raise ValueError(
            f"the corpus changed: the run was trained on bytes of SHA-256 {sha256}, now they have {identity['corpus']}"
        )
    if data := say(("data",)):
        raise ValueError(
            f"the splits of the run in {str(folder)!r} were others: {data}; bytes that were trained on would be "
            "validated on"
        )


def is_said_above(config: dict[str, Any], key: str) -> bool:
    """Whether a key of a flat configuration says again what one above it says. Earlier runs could set it apart."""
    return key in COPIES and config[key] == config.get(COPIES[key])


def is_one_of(key: str, keys: Sequence[str]) -> bool:
    """Whether a dotted key is one of the keys, or below one."""
    return any(key == one or key.startswith(f"{one}.") for one in keys)


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A nested configuration as dotted keys and values."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    values: dict[str, Any] = {}
    for key, value in tree.items():
        values.update(flat(value, f"{prefix}.{key}" if prefix else str(key)))
    return values
