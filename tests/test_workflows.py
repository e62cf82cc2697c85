"""What the continuous integration runs is what the project says that it supports; hooks and actions are pinned."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
WORKFLOWS = {path.name: path.read_text() for path in sorted((ROOT / ".github" / "workflows").glob("*.yml"))}
PYPROJECT = (ROOT / "pyproject.toml").read_text()
each_workflow = pytest.mark.parametrize("name", WORKFLOWS)


def workflow(name):
    return yaml.load(WORKFLOWS[name], yaml.BaseLoader)  # strings alone: YAML's `on` would be true, and 3.10 be 3.1


def steps(name):
    return [step for job in workflow(name)["jobs"].values() for step in job["steps"]]


def pinned(package):
    (version,) = re.findall(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    return version


def test_every_python_that_the_package_names_is_tested():
    (oldest,) = re.findall(r'^requires-python = ">=(.+)"$', PYPROJECT, re.MULTILINE)
    named = re.findall(r'"Programming Language :: Python :: (\d+\.\d+)"', PYPROJECT)
    assert workflow("ci.yml")["jobs"]["test"]["strategy"]["matrix"]["python"] == named
    assert named[0] == oldest
    (abi,) = re.findall(r'"py_limited_api": "cp(\d)(\d+)"', (ROOT / "setup.py").read_text())
    assert ".".join(abi) == oldest


def test_the_oldest_torch_and_the_constrained_one_are_tested():
    (oldest,) = re.findall(r"^OLDEST_TORCH = \((\d+), (\d+)\)", (ROOT / "setup.py").read_text(), re.MULTILINE)
    tested = workflow("ci.yml")["jobs"]["test"]["strategy"]["matrix"]["torch"]
    assert tested == [f"{'.'.join(oldest)}.0", pinned("torch")]


@each_workflow
def test_a_workflow_may_only_read_unless_a_job_says_otherwise(name):
    assert workflow(name)["permissions"] == {"contents": "read"}
    granted = {job: body["permissions"] for job, body in workflow(name)["jobs"].items() if "permissions" in body}
    release = {"attach": {"contents": "write"}, "publish": {"id-token": "write"}}
    assert granted == (release if name == "release.yml" else {})
    for step in steps(name):
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] == "false"


@each_workflow
def test_actions_are_pinned_to_commits(name):
    used = re.findall(r"uses: (.*)$", WORKFLOWS[name], re.MULTILINE)
    assert used
    for action in used:
        assert re.fullmatch(r"[\w-]+/[\w.-]+@[0-9a-f]{40}  # v\d+\.\d+\.\d+", action), action


@each_workflow
def test_nothing_of_an_event_is_pasted_into_a_shell(name):
    for step in steps(name):
        assert "${{" not in step.get("run", ""), step


def test_publishing_waits_for_the_owner_and_for_a_reviewer():
    publishing = [
        (job, body)
        for name in WORKFLOWS
        for job, body in workflow(name)["jobs"].items()
        if re.search(r"pypi-publish|twine", str(body))
    ]
    ((job, body),) = publishing
    assert job == "publish"
    assert body["environment"] == "package-index" and body["if"] == "vars.INDEX_OWNER_ALLOWS == 'yes'"


def test_workflows_run_what_is_there():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    commands = "\n".join(step.get("run", "") for name in WORKFLOWS for step in steps(name))
    assert set(re.findall(r"^make ([a-z-]+)", commands, re.MULTILINE)) <= targets
    assert ".ci/run" in commands and (ROOT / ".ci" / "run").stat().st_mode & 0o100
    makefile = (ROOT / "Makefile").read_text()
    for variable in ("CONSTRAINTS",):  # which ci.yml sets
        assert variable in WORKFLOWS["ci.yml"] and re.search(rf"^{variable} \?= ", makefile, re.MULTILINE)


def test_hooks_are_pinned_and_run_the_ruff_of_the_tests():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = {hook["id"]: hook for repository in config["repos"] for hook in repository["hooks"]}
    assert {"ruff-check", "codespell", "clang-format", "end-of-file-fixer", "check-added-large-files"} <= hooks.keys()
    for name, hook in hooks.items():
        assert hook["additional_dependencies"], name
        assert all("==" in requirement for requirement in hook["additional_dependencies"]), name
    for name in ("ruff-check", "ruff-format"):
        assert hooks[name]["additional_dependencies"] == [f"ruff=={pinned('ruff')}"]
