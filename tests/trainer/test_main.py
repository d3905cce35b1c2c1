"""The training command: the same ranks from every launcher, and one line for what a person got wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from models.errors import InputError, run_cli
from tests.support.backbones import tiny_recipe, write_recipe
from tests.support.paths import REPOSITORY
from tests.support.shards import write_set
from trainer.main import main, quiet_followers
from trainer.ranks import Ranks, from_environment

ADDRESS = {"MASTER_ADDR": "node1", "MASTER_PORT": "20001"}


def test_every_launcher_gives_the_same_ranks() -> None:
    launched = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", **ADDRESS}
    srun = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", **ADDRESS}
    assert from_environment(launched) == from_environment(srun) == Ranks(3, 8, 1)
    assert srun["RANK"] == "3"  # libraries read it too


def test_alone_is_one_rank_with_an_address_of_its_own() -> None:
    environment: dict[str, str] = {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}
    assert from_environment(environment) == Ranks()
    assert int(environment["MASTER_PORT"]) > 0


@pytest.mark.parametrize(
    "environment",
    [{"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, {"RANK": "0"}, {"RANK": "first", "WORLD_SIZE": "2"}],
)
def test_incomplete_variables_are_named(environment: dict[str, str]) -> None:
    with pytest.raises(InputError, match=r"MASTER_ADDR|RANK, WORLD_SIZE"):
        from_environment(environment)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("main")
    write_set(folder / "shards", [3])
    write_recipe(folder / "recipe.yaml", tiny_recipe(folder, folder / "shards"))
    return folder


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["nowhere.yaml", "--stage", "align"], "nowhere.yaml: no such recipe"),
        (["RECIPE", "--stage", "sft"], "it has align, lora"),
        (["RECIPE", "stages.align.bach=1", "--stage", "align"], "did you mean 'batch'"),
        (["RECIPE", "oops", "--stage", "align"], "key=value"),
        (["RECIPE", "--stage", "lora"], "no finished checkpoint to start from; run --stage align first"),
        (["RECIPE", "model.vision.path=missing/dir/x", "--stage", "align"], "missing/dir/x: no such directory"),
        (["RECIPE", "stages.align.data.sources.0.path=nodata", "--stage", "align"], "nodata"),
        (["RECIPE", "stages.align.data.max_length=9999", "--stage", "align"], "9999 is more than the 512 positions"),
        (
            [
                "RECIPE",
                "model.vision.keep_cls=true",
                "model.image={kind: anyres, pinpoints: [[48, 96]]}",
                "--stage",
                "align",
            ],
            "keep_cls: true",
        ),
        (["RECIPE", "stages.align.objective={kind: multi_token}", "--stage", "align"], "model.future"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str], named: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = [str(folder / "recipe.yaml") if word == "RECIPE" else word for word in words]
    assert run_cli(main, words) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    assert named in message
    assert not (folder / "run").exists()


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(InputError):
        run_cli(main, ["nowhere.yaml", "--stage", "align", "--debug"])


def test_only_the_first_rank_says_what_every_rank_finds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert run_cli(quiet_followers(main), ["nowhere.yaml", "--stage", "align"]) == 2
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_a_changed_recipe_is_refused_on_resume_and_a_finished_stage_stays(folder: Path) -> None:
    """As a script, which is how the deepspeed launcher starts it."""
    recipe: dict[str, Any] = json.loads((folder / "recipe.yaml").read_text())
    recipe["run"] = str(folder / "script")
    recipe["stages"]["align"]["duration"] = {"unit": "steps", "count": 2}
    write_recipe(folder / "script.yaml", recipe)

    def start(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "trainer/main.py", str(folder / "script.yaml"), "--stage", "align", *words]
        environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
        return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env=environment, check=False)

    first = start()
    assert first.returncode == 0, first.stderr
    assert "finished after 2 steps" in first.stdout
    again = start()
    assert again.returncode == 0
    assert "finished already" in again.stdout
    (folder / "script" / "align" / "finished.json").unlink()
    changed = start("stages.align.batch.global_rows=8")
    assert changed.returncode == 2
    assert "made with another batch" in changed.stderr
    assert "Traceback" not in changed.stderr
    free = start("stages.align.batch.micro_rows=1", "stages.align.data.num_workers=1", "stages.align.engine.zero=zero1")
    assert free.returncode == 0, free.stderr
    assert "going on from" in free.stdout
