"""The workflows and hooks of the repository's host run what runs here: make targets, .ci/run, our own programs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import yaml

from tests.support.paths import REPOSITORY

TARGETS = set(re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text("utf-8"), re.MULTILINE))
WORKFLOWS = sorted((REPOSITORY / ".github/workflows").glob("*.yml"))


def steps(file: Path) -> Iterator[str]:
    for job in yaml.safe_load(file.read_text("utf-8"))["jobs"].values():
        yield from (step["run"] for step in job["steps"] if "run" in step)


def test_workflows_call_make_targets_that_are_there() -> None:
    called = {target for file in WORKFLOWS for line in steps(file) for target in re.findall(r"\bmake ([\w-]+)", line)}
    assert called <= TARGETS
    assert called >= {"checks", "test-fast", "coverage", "docs", "docs-links", "dist"}
    lines = {line for file in WORKFLOWS for line in steps(file)}
    others = {line for line in lines if not line.startswith("make ")}
    assert [line for line in others if not re.match(r"sudo .*\.ci/run\b|cat docs/coverage\.md ", line)] == []


def test_ci_calls_make_targets_that_are_there() -> None:
    called = re.findall(r"^make ([\w-]+)$", (REPOSITORY / ".ci/run").read_text("utf-8"), re.MULTILINE)
    assert {"checks", "docs", "test"} <= set(called) <= TARGETS


def test_hooks_run_each_program_that_make_checks_runs() -> None:
    (ours,) = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text("utf-8"))["repos"]
    hooks = " ".join(hook["entry"] for hook in ours["hooks"])
    recipe = re.search(r"^checks:.*\n((?:\t.*\n)+)", (REPOSITORY / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert recipe is not None
    checks = re.findall(r"\$\(BIN\)/([\w-]+)", recipe[1])
    assert checks
    assert [program for program in checks if f".venv/bin/{program}" not in hooks] == []
