"""Compares the machine code of two builds of the kernels, kernel by kernel: did an edit change what the GPU runs?

    python tests/sass.py before.so after.so

takes libraries or object files. Kernels are matched by architecture and name, without namespaces. Prints those that
only one build has and those that differ, and exits with 1 if there are any. Needs cuobjdump and nvdisasm on PATH, which
CUDA's toolkit has, as have the packages nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm.
"""

import argparse
import itertools
import re
import subprocess
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    options = parser.parse_args(arguments)
    before, after = (kernels_of(path) for path in (options.before, options.after))
    found = differences(before, after)
    print("\n".join(found))
    print(f"{len(before)} kernels before, {len(after)} after, {len(found)} differences")
    return 1 if found or not before else 0


def kernels_of(path: Path) -> dict[str, list[str]]:
    """By architecture and name, such as "sm_80 dq_kernel<float, false>": what it needs, then its instructions."""
    listing, usage = (cuobjdump(option, path) for option in ("-sass", "-res-usage"))
    kernels = parse_listing(listing, demangled(listing))
    for name, resources in parse_usage(usage, demangled(usage)).items():
        kernels[name].insert(0, resources)
    return kernels


def cuobjdump(option: str, path: Path) -> str:
    return subprocess.run(["cuobjdump", option, path], capture_output=True, text=True, check=True).stdout


def demangled(listing: str) -> dict[str, str]:
    """The names in a listing, as `bare` has them."""
    names = sorted(set(re.findall(r"\bFunction ?:? (\S+?):?\s", listing)))
    result = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return dict(zip(names, map(bare, result.stdout.splitlines()), strict=True))


def bare(name: str) -> str:
    """A demangled name without namespaces, return type and parameters.

    >>> bare("void a::(anonymous namespace)::dq_kernel<(a::Math)1, 64>(a::Params)")
    'dq_kernel<(Math)1, 64>'
    """
    name = re.sub(r"\(anonymous namespace\)::|\b[A-Za-z_]\w*::", "", name).removeprefix("void ")
    return re.sub(r"(?<=[\w>])\([^()]*(\([^()]*\)[^()]*)*\)$", "", name)


def parse_listing(listing: str, names: dict[str, str]) -> dict[str, list[str]]:
    """The instructions and their encodings, by architecture and name."""
    kernels = {}
    for architecture, code in re.findall(r"^arch = (\S+)$(.*?)(?=^Fatbin|\Z)", listing, re.MULTILINE | re.DOTALL):
        for function in re.split(r"^\s*Function : ", code, flags=re.MULTILINE)[1:]:
            mangled, text = function.split(maxsplit=1)
            key = f"{architecture} {names[mangled]}"
            assert key not in kernels, f"two kernels are called {key}"
            kernels[key] = [" ".join(line.split()) for line in text.splitlines() if "/*" in line]
    return kernels


def parse_usage(listing: str, names: dict[str, str]) -> dict[str, str]:
    """Registers, stack, shared and constant memory, by architecture and name."""
    usage = {}
    for architecture, code in re.findall(r"^arch = (\S+)$(.*?)(?=^Fatbin|\Z)", listing, re.MULTILINE | re.DOTALL):
        for mangled, resources in re.findall(r"^ *Function (\S+):\s+(.*?) *$", code, re.MULTILINE):
            usage[f"{architecture} {names[mangled]}"] = resources
    return usage


def differences(before: dict[str, list[str]], after: dict[str, list[str]]) -> list[str]:
    found = [f"{name}: only before" for name in sorted(before.keys() - after.keys())]
    found += [f"{name}: only after" for name in sorted(after.keys() - before.keys())]
    for name in sorted(before.keys() & after.keys()):
        if before[name] != after[name]:
            found.append(f"{name}: {describe(before[name], after[name])}")
    return found


def describe(before: list[str], after: list[str]) -> str:
    pairs = itertools.zip_longest(before, after, fillvalue="(no more)")
    line, (old, new) = next((line, pair) for line, pair in enumerate(pairs) if pair[0] != pair[1])
    return f"{len(before)} and {len(after)} lines, which differ from line {line} on\n  - {old}\n  + {new}"


if __name__ == "__main__":
    sys.exit(main())
