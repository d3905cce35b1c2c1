"""The training command: one line for wrong input, and the behaviour of a second start."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from models.common.errors import InputError, run_cli
from tests.support import warm
from tests.support.backbones import tiny_recipe, write_recipe
from tests.support.paths import REPOSITORY
from tests.support.shards import write_set
from trainer.config.recipe import load_recipe
from trainer.distributed.context import DistributedContext
from trainer.main import choose_stages, main


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


def test_fewer_rows_than_ranks_is_said_of_any_stage_before_anything_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(folder / "recipe.yaml", ["stages.lora.batch.global_rows=1"])
    for stage in ("all", "lora"):
        with pytest.raises(
            InputError, match=r"stages\.lora\.batch\.global_rows: 1, fewer than the 2 ranks of this start"
        ):
            choose_stages(recipe, stage, DistributedContext(1, 2))
    assert choose_stages(recipe, "align", DistributedContext(1, 2)) == ["align"]


@pytest.mark.slow
def test_a_changed_recipe_is_refused_on_resume_and_a_finished_stage_stays(folder: Path) -> None:
    """As a script, which is how the deepspeed launcher starts it."""
    recipe: dict[str, Any] = json.loads((folder / "recipe.yaml").read_text())
    recipe["run"] = str(folder / "script")
    recipe["stages"]["align"]["duration"] = {"unit": "steps", "count": 2}
    write_recipe(folder / "script.yaml", recipe)

    def start(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        command = [warm.python(), "trainer/main.py", str(folder / "script.yaml"), "--stage", "align", *words]
        environment = {**os.environ, **(variables or {"DS_ACCELERATOR": "cpu"})}
        return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env=environment, check=False)

    refused = start(DS_ACCELERATOR="cuda", CUDA_VISIBLE_DEVICES="0")
    if not torch.cuda.is_available():
        assert refused.returncode == 2
        assert "error: GPUs are announced (CUDA_VISIBLE_DEVICES=0), but torch can use none" in refused.stderr
        assert not (folder / "script").exists()
    first = start()
    assert first.returncode == 0, first.stderr
    assert re.match(r"rank 0 on \S+: the CPU\ndevice cpu, precision fp32, attention one call a sample\n", first.stdout)
    lines = [json.loads(line) for line in (folder / "script/align/metrics.jsonl").read_text().splitlines()]
    assert lines[0]["on"] == {"device": "cpu", "precision": "fp32", "attention": "one call a sample"}
    assert "on" not in lines[-1]
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
