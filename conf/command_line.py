"""Answers train.py's command line before Hydra sees it: a wrong key in one line, ``--help`` with every key's meaning.

Hydra knows which keys there are, but not which option has them, and refuses in many lines or with a traceback.
"""

import itertools
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, Override, OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict

from conf.schema import CHOOSERS, CONF, COPIES, GROUPS, ConfigError, keys_of, options_of, shown, typed, unknown

MULTIRUN = ("-m", "--multirun")
# With these another configuration is composed than conf/config.yaml, or none.
OTHERS = ("--config-name", "-cn", "--config-path", "-cp", "--config-dir", "-cd", "--experimental-rerun", "--hydra-help",
          "--shell-completion", "-sc", "--version")  # fmt: skip
# The files of conf/hydra/ that need a plugin of Hydra, and its module.
PLUGINS = {
    "hydra/launcher=parallel": "hydra_plugins.hydra_joblib_launcher",
    "hydra/launcher=processes": "hydra_plugins.hydra_submitit_launcher",
    "hydra/launcher=slurm": "hydra_plugins.hydra_submitit_launcher",
    "hydra/sweeper=search": "hydra_plugins.hydra_optuna_sweeper",
}
COLUMN, WIDTH = 45, 120  # where --help's meanings start and end; in a narrower terminal both are less


def answer(arguments: Sequence[str]) -> list[str]:
    """The arguments that Hydra is to see. Ends the program after --help, or with one line for what cannot be."""
    if {"-h", "--help"} & set(arguments):
        columns = shutil.get_terminal_size((WIDTH, 0)).columns
        try:
            print(usage(max(80, min(columns, WIDTH))), end="", flush=True)
        except BrokenPipeError:  # head or less has seen enough; a plain end would write the rest once more
            os._exit(0)
        sys.exit()
    try:
        options = check(arguments)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    flags = [word for word in arguments if word in MULTIRUN]
    if not flags:
        return list(arguments)
    # Hydra takes -m before or behind all keys only, and would refuse the jobs whose option lacks a key
    return [flags[0], *(_forced(word, options) for word in arguments if word not in MULTIRUN)]


def _forced(word: str, options: dict[str, set[str]]) -> str:
    group, _, key = word.split("=", 1)[0].partition(".")
    common = all(key in keys_of(group, option) for option in options.get(group, ()))
    return word if common or not key else f"++{word}"


def of_options(config: DictConfig, choices: dict[str, str], overrides: Sequence[str]) -> tuple[DictConfig, list[str]]:
    """Configuration and overrides without keys of options that were not chosen.

    An experiment's file has them for the option that it chooses itself, a sweep's line for some of its jobs.
    """
    config, dropped = config.copy(), set()
    for group in GROUPS:
        if choices.get(group) not in options_of(group) or not config.get(group):
            continue
        others = {key for option in options_of(group) for key in keys_of(group, option)}
        for key in others - set(keys_of(group, choices[group])):
            with open_dict(config[group]):
                config[group].pop(key, None)
            dropped.add(f"{group}.{key}")
    lines = [override.removeprefix("++") for override in overrides]
    return config, [line for line in lines if line.split("=", 1)[0] not in dropped]


def check(arguments: Sequence[str]) -> dict[str, set[str]]:
    """Checks the keys of a command line, and returns the options that it leads to, by group; several in a sweep.

    Raises:
        ConfigError: a key is unknown or another option's, an option is none, or an experiment's values would stand in
            the place of its own, several values stand without -m, or -m beside what prints one configuration.
    """
    if any(word.split("=", 1)[0] in OTHERS for word in arguments):
        return {}
    multirun = bool(set(arguments) & set(MULTIRUN))
    if multirun and any(word.split("=", 1)[0] in ("--cfg", "-c", "--info", "-i") for word in arguments):
        raise ConfigError("-m does not go with --cfg or --info, which print one configuration: leave -m out")
    overrides = [override for word in words_of(arguments) if (override := _parse(word))]
    options = chosen(overrides, multirun=multirun)
    _check_options(overrides)
    for override in overrides:
        if override.is_sweep_override() and not multirun:
            raise ConfigError(
                f"{override.input_line} has several values, which needs -m: python train.py -m {override.input_line}; "
                "a comma within one value is quoted: KEY='\"a,b\"'"
            )
        _check_key(override, options)
    return options


def words_of(arguments: Sequence[str]) -> list[str]:
    """The words that override something: all but flags and what follows one."""
    words = []
    for before, word in zip(["", *arguments], arguments, strict=False):
        if word.startswith("-") or (before.startswith("-") and before not in MULTIRUN and "=" not in word):
            continue
        words.append(word)
    return words


def _parse(word: str) -> Override | None:
    """What Hydra reads in a word; None for its own keys."""
    if re.search(r"(?<!\w)_target_ *[=:]", word):  # Hydra would import what it names for its own plugins
        raise ConfigError(f"{shown(word)}: _target_ is not a key; what is built is chosen as GROUP=OPTION")
    if re.match(r"[+~]*hydra[./]", word):
        _check_plugin(word)
        return None
    if "=" not in word and not word.startswith("~"):
        raise ConfigError(f"{shown(word)} must be KEY=VALUE; python train.py --help lists the keys")
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException as error:
        key, _, value = word.partition("=")
        if re.fullmatch(r"[+~\w./@]+", key) and value and not re.search(r"[\"'\[\]{}$\\]", value):
            raise ConfigError(f"{key} got characters that must be quoted: {typed(key, value)}") from error
        raise ConfigError(f"{shown(word)} is no KEY=VALUE: {str(error).strip().splitlines()[0]}") from error


def _check_plugin(word: str) -> None:
    """Raises ConfigError for a launcher or a sweeper of conf/hydra/ whose package is not installed."""
    module = PLUGINS.get(word)
    try:
        missing = module is not None and find_spec(module) is None
    except ModuleNotFoundError:  # no plugin of Hydra at all
        missing = True
    if missing:
        raise ConfigError(f"{word} needs {module}, which is not installed: pip install -e '.[sweep]'")


def chosen(overrides: Sequence[Override], *, multirun: bool) -> dict[str, set[str]]:
    """The options that the command line leads to, by group; several in a sweep.

    Raises:
        ConfigError: it chooses one that there is not.
    """
    given = {override.key_or_group: _values(override) for override in overrides}
    for group in (*GROUPS, *CHOOSERS):
        wrong = [value for value in given.get(group, ()) if value not in options_of(group)]
        if wrong:
            raise ConfigError(f"{group} must be one of {', '.join(options_of(group))}, got {shown(wrong[0])}")
    found: dict[str, set[str]] = {group: set() for group in GROUPS}
    for names in itertools.product(*(given.get(chooser, [None]) for chooser in CHOOSERS)):
        options = {group: {option} for group, option in _defaults("config.yaml")}
        for file in (f"{chooser}/{name}.yaml" for chooser, name in zip(CHOOSERS, names, strict=True) if name):
            options.update({group: {option} for group, option in _defaults(file)})
            if multirun:
                options.update({group: set(str(values).split(",")) for group, values in _swept_in(file).items()})
        options.update({group: set(values) for group, values in given.items()})
        for group in GROUPS:
            found[group] |= options[group]
    return found


def _check_options(overrides: Sequence[Override]) -> None:
    """Checks that an option is what it says: the values of an experiment's file come after those of its own file.

    Raises:
        ConfigError: a chosen experiment, or debug, has another value for a key that makes the option another one than
            that which the experiment is meant for, and neither the line nor a file behind it says anything of the key.
    """
    given = {override.key_or_group: _values(override) for override in overrides}
    chosen = {chooser: [name for name in given.get(chooser, ()) if name] for chooser in CHOOSERS}
    on_line = {group: [(option, "") for option in given[group] if option] for group in GROUPS if group in given}
    for debug, sweep in itertools.product(chosen["debug"] or [None], chosen["sweep"] or [None]):
        behind = [(chooser, name) for chooser, name in (("debug", debug), ("sweep", sweep)) if name]
        said = set(given).union(*(_keys_in(f"{chooser}/{name}.yaml") for chooser, name in behind))
        for name in chosen["experiment"]:
            _check_file("experiment", name, _options_in(behind) | on_line, said)
        if debug:  # its sizes are meant for every sweep
            _check_file("debug", debug, on_line, set(given))


def _check_file(chooser: str, name: str, named: dict[str, list[tuple[str, str]]], said: set[str]) -> None:
    """Of one experiment, or debug: see ``_check_options``.

    Args:
        chooser: "experiment" or "debug".
        name: of the file.
        named: the options that come before its values, by group, and where they are chosen: "" on the line.
        said: keys that something behind the file gives.
    """
    written, meant = _values_in(f"{chooser}/{name}.yaml"), dict(_defaults("config.yaml"))
    meant |= dict(_defaults(f"{chooser}/{name}.yaml"))
    for group, (option, of) in [(group, one) for group, options in named.items() for one in options]:
        own, others = _values_in(f"{group}/{option}.yaml"), _values_in(f"{group}/{meant[group]}.yaml")
        lost = [
            f"{group}.{key}"
            for key, value in (written.get(group) or {}).items()
            if own.get(key, value) not in (value, others.get(key)) and f"{group}.{key}" not in said
        ]
        if lost:
            plain = (
                f"{group}={meant[group]}, or leave {of.removeprefix(' of ')} out"
                if of
                else f"leave {group}={option} out"
            )
            raise ConfigError(
                f"{chooser}={name} sets {', '.join(lost)} itself, whatever {group}={option}{of} has there: give "
                f"KEY=VALUE of these, or {plain}"
            )


def _options_in(files: Sequence[tuple[str, str]]) -> dict[str, list[tuple[str, str]]]:
    """By group the options that debug's and sweeps' files choose, and which file did."""
    found: dict[str, list[tuple[str, str]]] = {}
    for chooser, name in files:
        file = f"{chooser}/{name}.yaml"
        options = {group: [option] for group, option in _defaults(file)}
        options |= {group: str(values).split(",") for group, values in _swept_in(file).items()}
        found |= {
            group: [(one, f" of {chooser}={name}") for one in options[group]] for group in GROUPS if group in options
        }
    return found


def _keys_in(file: str) -> set[str]:
    """The keys of groups that a file writes, and those that it sweeps."""
    values = _values_in(file)
    return {f"{group}.{key}" for group in GROUPS for key in values.get(group) or {}} | set(_swept_in(file))


def _swept_in(file: str) -> dict[str, Any]:
    """What one of conf/'s files sweeps: the values of each key, with commas between."""
    return OmegaConf.select(OmegaConf.load(CONF / file), "hydra.sweeper.params") or {}


def _values_in(file: str) -> dict[str, Any]:
    """What one of conf/'s files says, its references unresolved."""
    return OmegaConf.to_container(OmegaConf.load(CONF / file))


def _defaults(file: str) -> Iterator[tuple[str, str]]:
    """The options in the defaults list of one of conf/'s files."""
    for entry in OmegaConf.load(CONF / file).get("defaults", ()):
        if not isinstance(entry, str):
            for group, option in entry.items():
                yield group.removeprefix("override ").removeprefix("/"), option


def _values(override: Override) -> list[str | None]:
    """The values of a group's override, or none where it removes the group."""
    if override.type == OverrideType.DEL:
        return [None]
    value = override._value
    if isinstance(value, Glob):
        return value.filter(options_of(override.key_or_group))
    values = value.list if isinstance(value, ChoiceSweep) else [value]
    return [None if value is None else str(getattr(value, "text", value)) for value in values]


def _check_key(override: Override, options: dict[str, set[str]]) -> None:
    key = override.key_or_group
    group, _, name = key.partition(".")
    top = _top_level()
    if group == "sweep" and name:  # what a sweep's file refers to itself
        return
    if group not in (*top, *GROUPS, *CHOOSERS) or (name and group not in GROUPS):
        raise ConfigError(unknown("", key, [*top, *GROUPS, *CHOOSERS]))
    if isinstance(override._value, dict):
        raise ConfigError(f"{key} takes no keys of its own, got {shown(override._value)}")
    _check_name(override, options)
    if override.type == OverrideType.ADD:  # what there is, and nothing else is accepted
        line = override.input_line
        raise ConfigError(f"{line}: {key} is a key already, which + would add: drop the +, {line.removeprefix('+')}")


def _check_name(override: Override, options: dict[str, set[str]]) -> None:
    """Checks the key of an option."""
    key = override.key_or_group
    group, _, name = key.partition(".")
    if not name:
        return
    if name == "kind":
        raise ConfigError(f"{key} is set by {group}=OPTION; accepted: {', '.join(options_of(group))}")
    keys = {option: keys_of(group, option) for option in sorted(options[group])}
    first, _, rest = name.partition(".")
    if rest or not any(name in known for known in keys.values()):
        accepted = list(dict.fromkeys(itertools.chain(*keys.values())))
        raise ConfigError(unknown(f"{group}.", first if not rest else name, accepted))
    if key in COPIES:
        source, value = COPIES[key], override.input_line.partition("=")[2]
        raise ConfigError(f"{key} follows {source} and takes no value of its own: give {source}={value or 'VALUE'}")


def _top_level() -> list[str]:
    return [key for key in OmegaConf.load(CONF / "config.yaml") if key not in ("defaults", "hydra")]


def usage(width: int = WIDTH) -> str:
    """What --help prints: every key with its default and its meaning, from the comments beside them in conf/."""
    entry = partial(_entry, width=width)
    defaults = dict(_defaults("config.yaml"))
    lines = ["python train.py [-m] [KEY=VALUE ...]", ""]
    lines += ["-m sweeps over values with commas between; --cfg job prints what a line"]
    lines += ["composes; docs/training.md has examples."]
    lines.append("")
    for key, value, meaning in described("config.yaml"):
        lines += entry(key, value, meaning) if key not in defaults else []
    for group, meaning in [(key, meaning) for key, _, meaning in described("config.yaml") if key in defaults]:
        options = sorted(options_of(group), key=lambda option: option != defaults[group])  # the default first
        lines += ["", *entry(group, "|".join(options), meaning)]
        entries: dict[tuple[str, str], dict[str, str]] = {}
        for option in options if group in GROUPS else ():
            for key, value, meaning in described(f"{group}/{option}.yaml"):
                entries.setdefault((key, meaning), {})[option] = value
        for (key, meaning), values in entries.items():
            some = "" if len(values) == len(options) else f"{', '.join(values)}: "
            lines += entry(f"  {group}.{key}", "|".join(dict.fromkeys(values.values())), some + meaning)
    return "".join(f"{line}\n" for line in lines)


def _entry(key: str, value: str, meaning: str, *, width: int) -> list[str]:
    column = COLUMN * width // WIDTH
    left, right = f"{key}={value}", textwrap.wrap(meaning, width - column, break_on_hyphens=False)
    if len(left) >= column:
        rest = " " * (len(key) + 1)  # of many sweeps
        lines = textwrap.wrap(left.replace("|", "| "), width, subsequent_indent=rest, break_long_words=False)
        return [*(line.replace("| ", "|") for line in lines), *(" " * column + line for line in right)]
    return [f"{first:<{column}}{line}" for first, line in itertools.zip_longest([left], right, fillvalue="")]


def described(file: str) -> list[tuple[str, str, str]]:
    """Key, value and comment of every key in one of conf/'s files, but for its kind; groups are keys, too."""
    entries: list[tuple[str, str, str]] = []
    for line in (CONF / file).read_text(encoding="utf-8").splitlines():
        if line.startswith("hydra:"):
            break
        key = re.fullmatch(r"(?:  - )?(\w+): +(.*?)(?: +# (.*))?", line)
        more = re.fullmatch(r" +# (.*)", line)
        if key:
            entries.append((key[1], key[2], key[3] or ""))
        elif more and entries:
            entries[-1] = (*entries[-1][:2], f"{entries[-1][2]} {more[1]}")
    return [entry for entry in entries if entry[0] != "kind"]
