"""docs/api.md, made from the signatures and docstrings of the library's public functions.

python -m scripts.api            # checks that the page is what they say
python -m scripts.api --write    # writes it anew
"""

import argparse
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flash_cosine_sim_attention as library
from scripts import Parser, run_script

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "api.md"
HEAD = """# The functions

All of `flash_cosine_sim_attention`, from its docstrings (by `python -m scripts.api --write`; what is said here is to be
changed there). [library.md](library.md) shows the calls by example.
"""
# Of a docstring, and what the page calls them.
SECTIONS = {"Args": "Arguments", "Returns": "Returns", "Raises": "Errors"}


def public_functions() -> list[Callable[..., Any]]:
    """The functions of the library's __all__, in alphabetical order."""
    return [value for name in sorted(library.__all__) if inspect.isfunction(value := getattr(library, name))]


def signature(function: Callable[..., Any]) -> str:
    """The function's signature, a parameter a line."""
    found = inspect.signature(function)
    lines, kind = [], None
    for parameter in found.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and kind not in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL):
            lines.append("    *,")
        kind = parameter.kind
        lines.append(f"    {parameter},")
    result = inspect.formatannotation(found.return_annotation)
    text = "\n".join([f"{function.__name__}(", *lines, f") -> {result}"])
    return text.replace("torch.Tensor", "Tensor").replace("'", '"')


def sections(function: Callable[..., Any]) -> dict[str, str]:
    """The docstring's parts by their heads in SECTIONS, not indented; what comes before the first is under ""."""
    text = inspect.getdoc(function) or ""
    parts = re.split(rf"^({'|'.join(SECTIONS)}):\n", text, flags=re.MULTILINE)
    found = {"": parts[0].strip()}
    for head, body in zip(parts[1::2], parts[2::2], strict=True):
        found[head] = inspect.cleandoc(body)
    return found


def entries(body: str) -> list[tuple[str, str]]:
    """(name, what is said of it) of every `name: text` in a section; lines that go on are indented."""
    found = re.findall(r"^(\S[^:\n]*): (.*(?:\n[ ]+.*)*)", body, re.MULTILINE)
    return [(name, re.sub(r"\s*\n\s*", " ", text)) for name, text in found]


def described(function: Callable[..., Any]) -> list[str]:
    """The names that the docstring's Args describe; `q, k: ...` describes two."""
    return [name.lstrip("*") for names, _ in entries(sections(function).get("Args", "")) for name in names.split(", ")]


def check_arguments(function: Callable[..., Any], functions: Sequence[Callable[..., Any]]) -> None:
    """Raises ValueError where docstring and signature have other arguments.

    `Like NAME` at a docstring's beginning leaves the arguments that both have to the function of that name.
    """
    names, expected = described(function), list(inspect.signature(function).parameters)
    for other in functions:
        if sections(function)[""].startswith(f"Like {other.__name__}"):
            expected = [name for name in expected if name in names or name not in described(other)]
    if sorted(names) != sorted(expected):
        raise ValueError(
            f"the docstring of {function.__name__} must describe its arguments {', '.join(expected) or '(none)'}, "
            f"got {', '.join(names) or 'none'}"
        )


def described_function(function: Callable[..., Any]) -> str:
    """The function's part of the page."""
    found = sections(function)
    lines = [f"## {function.__name__}", "", "```py", signature(function), "```", "", found.pop("")]
    for head, body in found.items():
        pairs = entries(body) if head != "Returns" else []
        # An item is one line: broken ones could begin with the * of a product, which Markdown takes for another item.
        items = [f"- `{names.replace(', ', '`, `')}`: {text}" for names, text in pairs]
        lines += ["", f"**{SECTIONS[head]}**", "", *(items or [body])]
    return "\n".join(lines)


def page() -> str:
    """The whole of docs/api.md. Raises ValueError where a docstring and its signature differ."""
    functions = public_functions()
    for function in functions:
        check_arguments(function, functions)
    return "\n".join([HEAD, *(described_function(function) + "\n" for function in functions)])


def check(arguments: argparse.Namespace) -> None:
    """Compares or writes; ValueError where the page is not what the docstrings say."""
    new = page()
    same = PAGE.exists() and PAGE.read_text(encoding="utf-8") == new
    if not same and not arguments.write:
        raise ValueError(f"docs/{PAGE.name} is not what the docstrings say; --write makes it anew")
    if not same:
        PAGE.write_text(new, encoding="utf-8")
    print(f"docs/{PAGE.name} is what the docstrings say" if same else f"written: docs/{PAGE.name}")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = Parser(prog="python -m scripts.api", description="Check docs/api.md against the docstrings, or write it.")
    parser.add_argument("--write", action="store_true", help="write the page")
    return run_script(parser, check, argv)


if __name__ == "__main__":
    sys.exit(main())
