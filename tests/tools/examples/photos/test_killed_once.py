"""A stage is killed when that costs steps, once, with all of its processes, and the same command ends it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from models.common.files import append_line
from tests.support import warm
from tests.support.backbones import tiny_recipe, write_recipe
from tests.support.paths import REPOSITORY
from tests.support.patience import GUARD_S, wait_until
from tests.support.shards import write_set
from tools.examples.photos.killed_once import RECORD, moment_to_kill

STAGE = """
import json, os, subprocess, sys, time
from pathlib import Path
stage = Path(sys.argv[1])
(stage / "checkpoints/step_000003").mkdir(parents=True, exist_ok=True)
if (stage / "first").is_file():
    sys.exit(int(sys.argv[2]))
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
(stage / "first").write_text(str(child.pid))
(stage / "metrics.jsonl").write_text(json.dumps({"step": 4}) + "\\n")
time.sleep(3600)
"""


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def killed_once(stage: Path, *command: str) -> list[str]:
    return [sys.executable, "-m", "tools.examples.photos.killed_once", str(stage), "--", *command]


def test_it_is_killed_when_a_step_behind_a_checkpoint_would_be_lost(tmp_path: Path) -> None:
    assert moment_to_kill(tmp_path) is None
    append_line(tmp_path / "metrics.jsonl", {"step": 2})
    assert moment_to_kill(tmp_path) is None
    (tmp_path / "checkpoints" / "step_000002").mkdir(parents=True)
    assert moment_to_kill(tmp_path) is None
    append_line(tmp_path / "metrics.jsonl", {"step": 3})
    assert moment_to_kill(tmp_path) == {"checkpoint": 2, "step": 3}
    (tmp_path / "finished.json").write_text("{}")
    assert moment_to_kill(tmp_path) is None


@pytest.mark.slow
def test_every_process_dies_and_the_same_command_goes_on(tmp_path: Path) -> None:
    command = killed_once(tmp_path, sys.executable, "-c", STAGE, str(tmp_path), "7")
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=GUARD_S, check=False)
    assert done.returncode == 7, done.stderr  # the second start's own
    assert "killed; the same command again" in done.stdout
    assert json.loads((tmp_path / RECORD).read_text()) == {"checkpoint": 3, "step": 4}
    child = int((tmp_path / "first").read_text())
    wait_until("the killed command's child is dead", lambda: not is_alive(child))


@pytest.mark.slow
def test_a_signal_reaches_the_command(tmp_path: Path) -> None:
    (tmp_path / RECORD).write_text("{}")  # killed before: this start only runs it
    process = subprocess.Popen(killed_once(tmp_path, sys.executable, "-c", STAGE, str(tmp_path), "0"), cwd=REPOSITORY)
    wait_until("it runs", (tmp_path / "metrics.jsonl").is_file)
    process.send_signal(signal.SIGTERM)
    assert process.wait(GUARD_S) != 0
    child = int((tmp_path / "first").read_text())
    wait_until("the command's child is dead", lambda: not is_alive(child))


@pytest.mark.slow
def test_a_killed_stage_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    write_set(tmp_path / "shards", [9, 9], words=20)
    recipe: dict[str, Any] = tiny_recipe(tmp_path, tmp_path / "shards")
    recipe["stages"]["align"]["duration"] = {"unit": "steps", "count": 60}
    file = write_recipe(tmp_path / "recipe.yaml", recipe)
    train = ("-m", "trainer.main", str(file), "--stage", "align")
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    weights = []
    for name, killed in (("killed", True), ("calm", False)):
        run = tmp_path / name
        command = [*train, f"run={run}"]
        words = killed_once(run / "align", sys.executable, *command) if killed else [warm.python(), *command]
        subprocess.run(words, cwd=REPOSITORY, env=environment, timeout=GUARD_S, check=True)
        newest = run / "align" / "checkpoints" / json.loads((run / "align" / "finished.json").read_text())["checkpoint"]
        weights.append(load_file(newest / "rank_00000_of_00001.safetensors"))
    assert (tmp_path / "killed" / "align" / RECORD).is_file()
    assert weights[0].keys() == weights[1].keys()
    assert all((weights[0][key] == weights[1][key]).all() for key in weights[0])
