"""The first change that CONTRIBUTING describes, made as it says in a copy: types, test, training, merge."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.backbones import tiny_recipe, write_recipe
from tests.support.installed import copy_sources
from tests.support.paths import REPOSITORY
from tests.support.shards import write_set

SECTION = (REPOSITORY / "CONTRIBUTING.md").read_text("utf-8").partition("## A first change")[2].partition("\n## ")[0]
PART, LINE, TEST = re.findall(r"```python\n(.*?)```", SECTION, flags=re.DOTALL)
COMMANDS = [shlex.split(line) for line in re.search(r"```bash\n(.*?)```", SECTION, re.DOTALL)[1].splitlines()]  # type: ignore[index]
TABLE = "models/projectors/base.py"


@pytest.fixture
def changed(tmp_path: Path) -> Path:
    """A copy of the project with the files and the line of the text."""
    copy = copy_sources(tmp_path / "copy")
    part, test = (re.search(rf"{words}.*?`([\w/]+\.py)`", SECTION)[1] for words in (r"\*\*1", r"\*\*3"))  # type: ignore[index]
    for name, text in ((part, PART), (test, TEST)):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text(text)
    table = (copy / TABLE).read_text("utf-8")
    last = re.search(r'\n        "pixel_shuffle": .*\n', table)
    assert last is not None
    (copy / TABLE).write_text(table[: last.end()] + LINE + table[last.end() :], encoding="utf-8")
    return copy


def run(copy: Path, *words: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(copy), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(words, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.slow
def test_the_first_change_passes_its_checks_trains_and_is_merged(changed: Path, tmp_path: Path) -> None:
    new = ["models/projectors/residual.py", "tests/models/test_residual_projector.py"]
    run(changed, sys.executable, "-m", "ruff", "check", TABLE, *new)
    run(changed, sys.executable, "-m", "ruff", "format", "--check", TABLE, *new)
    run(changed, sys.executable, "-m", "mypy", TABLE, new[0])
    tested, train, merge, opened = COMMANDS
    run(changed, sys.executable, *tested[1:], "-p", "no:cacheprovider")

    write_set(tmp_path / "shards", [8])
    recipe = tiny_recipe(tmp_path, tmp_path / "shards")
    recipe["stages"]["align"]["duration"] = {"unit": "steps", "count": 2}
    file = write_recipe(tmp_path / "tiny.yaml", recipe)
    assert train[:5] == ["deepspeed", "trainer/main.py", "recipes/llava15_tiny.yaml", "--stage", "align"]
    run(changed, sys.executable, "trainer/main.py", str(file), *train[3:])
    run(changed, sys.executable, *merge[1:])
    assert opened == ["sightline", "demo", merge[-1]]
    assert '"kind": "residual"' in (changed / merge[-1] / "config.json").read_text()
