"""What this package is called, its version, and a warning where it is not the only one of its name.

Its predecessor, 0.1 and 0.2 on the package index, has the same distribution and the same module name: installed
beside this one or over it, either may be the one that is imported. The build reads __version__ from here without
importing anything, and a test compares the name with pyproject.toml's: each is a literal on a line of its own.
"""

import os
import re
import sys
import warnings
from collections.abc import Iterator
from importlib.machinery import PathFinder
from importlib.metadata import distributions

DISTRIBUTION = "flash-cosine-sim-attention"
__version__ = "1.0.0"

MODULE = "flash_cosine_sim_attention"


class InstallationWarning(UserWarning):
    """Another package of this one's name is installed, too."""


def warn_of_others() -> None:
    """Warns where another copy of the module, or the metadata of another version, lies on sys.path.

    Called when the package is imported; an installation that cannot be read is none of its business, so it raises
    nothing, but the warning itself where warnings are errors.
    """
    folder = os.path.realpath(os.path.dirname(__file__))
    entries = list(dict.fromkeys(entry for entry in sys.path if isinstance(entry, str)))
    found = dict.fromkeys(
        [f"another copy of it is in {copy}" for copy in _other_copies(folder, entries)]
        + [f"{place} has the metadata of {DISTRIBUTION} {version}" for place, version in _other_metadata(entries)]
    )
    if found:
        warnings.warn(
            f"{MODULE} {__version__} is loaded from {folder}, but {' and '.join(found)}: run `pip uninstall "
            f"{DISTRIBUTION}` until it finds none, remove what is left, and install the one that you want again",
            InstallationWarning,
            stacklevel=3,  # the line that imports the package
        )


def _other_copies(folder: str, entries: list[str]) -> Iterator[str]:
    """Where else Python would find the module, in the order of sys.path."""
    for entry in entries:
        try:
            spec = PathFinder.find_spec(MODULE, [entry])
            if spec is None or spec.origin is None:  # nothing, or a folder without __init__.py
                continue
            package = spec.submodule_search_locations is not None
            copy = os.path.realpath(os.path.dirname(spec.origin) if package else spec.origin)
        except Exception:  # an importer of someone else's
            continue
        if copy != folder:
            yield copy


def _other_metadata(entries: list[str]) -> Iterator[tuple[str, str]]:
    """(folder, version) of every installation of the distribution whose version is another."""
    try:
        installed = list(distributions(name=DISTRIBUTION, path=entries))
    except Exception:  # a finder of someone else's
        return
    for distribution in installed:
        try:
            text = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or ""
            folder = os.path.realpath(distribution.locate_file(""))
        except Exception:
            continue
        # The first line of that form: parsing the whole costs more. An interrupted installation may have none.
        version = re.search(r"^Version: *(\S+)", text, re.MULTILINE)
        if version is not None and version[1] != __version__:
            yield folder, version[1]
