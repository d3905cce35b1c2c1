"""Every command and the suite in docs/evaluation.md are ones that the program takes."""

from __future__ import annotations

import shlex
from pathlib import Path

from eval import run
from tests.support.paths import REPOSITORY

PAGE = (REPOSITORY / "docs" / "evaluation.md").read_text(encoding="utf-8")


def commands(module: str) -> list[list[str]]:
    lines = PAGE.replace("\\\n", " ").splitlines()
    start = f"python -m {module} "
    return [shlex.split(line.strip().removeprefix(start)) for line in lines if line.strip().startswith(start)]


def test_commands_name_tasks_with_options_they_have() -> None:
    assert len(commands("eval.run")) == 4
    for arguments in commands("eval.run"):
        parsed = run._parser().parse_args(arguments)
        assert parsed.suite is not None or run._single_config(parsed)


def test_suite_is_one(tmp_path: Path) -> None:
    block = PAGE.split("# suite.yaml:")[1].split("\n\n")[0].splitlines()[1:]
    suite = tmp_path / "suite.yaml"
    suite.write_text("\n".join(line.strip() for line in block))
    assert [config.kind for config in run.suite_configs(suite)] == ["vqa", "vqa", "caption", "image_gain"]
