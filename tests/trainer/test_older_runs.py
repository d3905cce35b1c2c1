"""A run that an older version began is gone on with: same weights at its end, same names on disk, and it merges.

tests/support/fixtures/run_0_1 was written by commit 86a06d3, the last one before the modules moved into rooms. It holds
tiny random parts (`vision`, `language`), nine captioned images (`shards`), and a run of `tiny_recipe` over them with
every path relative to the folder and `checkpoint.keep: 1`: `align` finished by two ranks, `lora` by one rank, killed
after step 5 of 6 with its checkpoint of step 4. `lora_final.safetensors` and `lora_metrics.jsonl` are what the same
commit ended with when it was not killed. To make it again, check that commit out, and from an empty folder with the
checkout on PYTHONPATH run:

    write_set(Path("shards"), [5, 4])                                          # tests.support.shards
    recipe = tiny_recipe(Path("."), Path("shards"))                            # tests.support.backbones
    recipe["run"] = "run"; each stage's checkpoint["keep"] = 1
    run_on_ranks(2, train_all, [(recipe, "align", {})])                        # tests.support.ranks, .training
    run_on_ranks(1, train_all, [(recipe, "lora", {"stop_after": 5})])          # both in that folder

and for the two files of what it ended with: copy `run` without `lora` to `whole`, set `recipe["run"] = "whole"`, train
`lora` to its end, save `weights(recipe, "lora")` and copy its metrics.jsonl.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from models.bundle import read_manifest
from models.common.files import write_json
from models.common.source import sha256_of
from tests.support import warm
from tests.support.backbones import write_recipe
from tests.support.paths import REPOSITORY
from tests.support.ranks import run_on_ranks
from tests.support.shards import write_set
from tests.support.sinks import sink_recipe
from tests.support.training import losses, same_weights, train_all, vary
from trainer.checkpoint.initial_weights import finished_checkpoint
from trainer.checkpoint.reader import CheckpointReader
from trainer.config.recipe import load_recipe
from trainer.ledger.audit import Fate, audit

FIXTURE = REPOSITORY / "tests" / "support" / "fixtures" / "run_0_1"


def command(folder: Path, *words: str) -> str:
    """What a person types, in the folder that the recipe's paths are relative to; its output."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [warm.python(), "-m", *words], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
def test_it_ends_as_the_version_that_began_it_would_have(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(FIXTURE, tmp_path / "run_0_1"))
    told = command(folder, "trainer.main", "run/recipe.json", "--stage", "all")
    assert "tiny/align: finished already" in told
    assert "going on from run/lora/checkpoints/step_000004" in told

    finished = finished_checkpoint(folder / "run", "lora")
    assert finished == folder / "run" / "lora" / "checkpoints" / "step_000006"
    reader, expected = CheckpointReader.open(finished), load_file(FIXTURE / "lora_final.safetensors")
    assert set(reader.names()) == set(expected)
    for name, value in expected.items():
        # Another processor or torch adds up in another order, and a clipping factor of 1.000001 moves the last bits.
        torch.testing.assert_close(reader.weight(name), value, rtol=1e-5, atol=1e-7, msg=f"{name} differs")

    before, now = lines(FIXTURE / "lora_metrics.jsonl"), lines(folder / "run" / "lora" / "metrics.jsonl")
    assert [line["step"] for line in now] == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] for line in now] == pytest.approx([line["loss"] for line in before], rel=1e-6)
    assert now[-1].keys() == before[-1].keys()

    for stage in ("align", "lora"):
        account = audit(folder / "run" / stage)
        assert account.is_clean
        assert len(account.draws[Fate.LEARNT]) == 24  # 6 steps of 4 rows of one sample

    command(folder, "tools.merge", "run", "bundle", "--stage", "lora")
    assert read_manifest(folder / "bundle").parity.passed


def forget_openings(run: Path) -> None:
    """What a version without `data.template.opening` would have left: recipe.json and checkpoints lack the key."""
    record = json.loads((run / "recipe.json").read_text(encoding="utf-8"))
    for stage in record["stages"].values():
        del stage["data"]["template"]["opening"]
    write_json(run / "recipe.json", record)
    for state_file in run.glob("*/checkpoints/*/state.json"):
        state = json.loads(state_file.read_text(encoding="utf-8"))
        del state["config"]["data"]["template"]["opening"]
        write_json(state_file, state)
        manifest = json.loads(state_file.with_name("manifest.json").read_text(encoding="utf-8"))
        entry = {"bytes": state_file.stat().st_size, "sha256": sha256_of(state_file)}
        manifest["files"]["state.json"] = entry
        write_json(state_file.with_name("manifest.json"), manifest)


@pytest.mark.slow
def test_a_run_that_put_its_images_at_the_front_goes_on_doing_so(tmp_path: Path) -> None:
    """Bit for bit, although the recipe's default is now another and its tokenizer would open with `<|im_start|>`."""
    write_set(tmp_path / "shards", [5, 4])
    whole = sink_recipe(tmp_path, tmp_path / "shards", "", "fp32")
    older, silent = vary(whole, "older", "align"), vary(whole, "older", "align")
    for stage in silent["stages"].values():
        del stage["data"]["template"]["opening"]
    file = write_recipe(tmp_path / "recipe.yaml", silent)
    run_on_ranks(1, train_all, [(whole, "align", {}), (older, "align", {"stop_after": 4})])
    forget_openings(Path(older["run"]))
    resumed = load_recipe(file).model_dump(mode="json")
    assert resumed["stages"]["align"]["data"]["template"]["opening"] == ""
    run_on_ranks(1, train_all, [(resumed, "align", {})])
    assert losses(resumed, "align") == losses(whole, "align")
    same_weights(resumed, whole, "align", rtol=0, atol=0)
