"""Stages on a device: each ZeRO stage's steps against the CPU's, resuming, memory that runs out, a rank that dies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from models.common.exit_codes import ExitCode
from tests.support.backbones import make_language, tiny_recipe, write_recipe
from tests.support.ranks import run_on_ranks
from tests.support.shards import write_set
from tests.support.training import losses, same_weights, train_all, vary
from trainer.distributed.ports import choose_port

ZEROS = ("zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")
FULL = {"kind": "full", "learning_rate": 1e-4}
START_S = 240.0


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    write_set(tmp_path / "shards", [5, 1, 9])
    made = tiny_recipe(tmp_path, tmp_path / "shards")
    made["stages"]["lora"]["init"] = None
    return made


def train(world_size: int, recipes: list[dict[str, Any]], options: list[dict[str, Any]] | None = None) -> None:
    given = options or [{} for _ in recipes]
    run_on_ranks(world_size, train_all, [(each, "lora", how) for each, how in zip(recipes, given, strict=True)])


def command(recipe: Path, rank: int, world_size: int, port: int, **environment: str) -> subprocess.Popen[str]:
    """A rank of its own process, as a launcher starts it."""
    meeting = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    return subprocess.Popen(
        [sys.executable, "-m", "trainer.main", str(recipe), "--stage", "lora"],
        env={**os.environ, **meeting, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **environment},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("zero", ZEROS)
def test_a_zero_stage_steps_as_on_the_cpu(recipe: dict[str, Any], zero: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32: sums in another order at first, and then Adam's first steps, which enlarge the last bits."""
    on_gpu, on_cpu = (vary(recipe, f"{zero}_{where}", "lora", engine__zero=zero) for where in ("gpu", "cpu"))
    train(1, [on_gpu])
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv(
        "CUDA_VISIBLE_DEVICES", ""
    )  # the processes that these ranks are forked from see no device either
    train(1, [on_cpu])
    ours, expected = losses(on_gpu, "lora"), losses(on_cpu, "lora")
    assert ours[0] == pytest.approx(expected[0], rel=1e-5)
    assert ours == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("zero", ["zero2", "zero3", "zero3_offload"])
def test_full_tuning_in_bf16_follows_fp32(recipe: dict[str, Any], zero: str) -> None:
    common = {"tune": {"projector": FULL, "language": FULL}, "engine__zero": zero}
    runs = [vary(recipe, precision, "lora", **common, engine__precision=precision) for precision in ("bf16", "fp32")]
    train(1, runs)
    assert losses(runs[0], "lora") == pytest.approx(losses(runs[1], "lora"), rel=2e-2)


def test_resumed_twice_is_uninterrupted(recipe: dict[str, Any]) -> None:
    """Bit for bit, with `engine.deterministic`."""
    common = {"engine__deterministic": True, "engine__precision": "bf16"}
    whole, broken = (vary(recipe, name, "lora", **common) for name in ("whole", "broken"))
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    train(1, [whole, broken, broken, broken], [{}, {"stop_after": 2}, {"stop_after": 4}, {}])
    assert losses(broken, "lora") == losses(whole, "lora")
    same_weights(broken, whole, "lora", rtol=0, atol=0)


def test_memory_that_runs_out_is_one_line_and_code_2(recipe: dict[str, Any], tmp_path: Path) -> None:
    """512 rows of a model of 150 million weights need 23 GB, by preflight."""
    make_language(tmp_path / "wide", width=1024, num_layers=16)
    recipe["model"]["language"]["path"] = str(tmp_path / "wide")
    write_set(tmp_path / "many", [600])
    recipe["stages"]["lora"]["data"]["sources"][0]["path"] = str(tmp_path / "many")
    free, _ = torch.cuda.mem_get_info()
    held = torch.empty(int(free - 6e9), dtype=torch.uint8, device="cuda")
    file = write_recipe(
        tmp_path / "recipe.yaml", vary(recipe, "oom", "lora", batch__global_rows=512, batch__micro_rows=512)
    )
    rank = command(file, 0, 1, choose_port())
    said, _ = rank.communicate(timeout=START_S)
    del held
    assert rank.returncode == ExitCode.INPUT_ERROR, said
    assert "ran out of memory" in said
    assert "stages.lora.batch.micro_rows=256 (a rank takes 512 rows at once)" in said


@pytest.mark.multi
def test_two_devices_step_as_one(recipe: dict[str, Any]) -> None:
    runs = [vary(recipe, f"{zero}_two", "lora", engine__zero=zero) for zero in ("zero0", "zero1", "zero2", "zero3")]
    alone = vary(recipe, "alone", "lora")
    train(2, runs)
    train(1, [alone])
    for each in runs:
        assert losses(each, "lora") == pytest.approx(losses(alone, "lora"), rel=1e-4)


@pytest.mark.multi
def test_a_rank_that_is_killed_ends_the_other_with_76(recipe: dict[str, Any], tmp_path: Path) -> None:
    """Under NCCL the other blocks in a collective; its watch ends it after the recipe's limit."""
    run = vary(recipe, "killed", "lora", duration={"unit": "steps", "count": 100_000}, guard={"rank_timeout_s": 20.0})
    file, port = write_recipe(tmp_path / "recipe.yaml", run), choose_port()
    ranks = [command(file, rank, 2, port) for rank in (0, 1)]
    log = Path(run["run"]) / "lora" / "metrics.jsonl"
    ends_s = time.monotonic() + START_S
    while not (log.is_file() and len(log.read_text().splitlines()) > 3):
        assert time.monotonic() < ends_s, "no step was taken"
        time.sleep(0.5)
    ranks[1].kill()
    said, _ = ranks[0].communicate(timeout=120)
    ranks[1].communicate()
    assert ranks[0].returncode == ExitCode.LOST_RANK, said


def test_the_first_lines_say_what_it_computes_with(recipe: dict[str, Any]) -> None:
    run = vary(recipe, "said", "lora", engine__precision="bf16")
    train(1, [run])
    first = json.loads((Path(run["run"]) / "lora" / "metrics.jsonl").read_text().splitlines()[0])["on"]
    assert first["device"] == torch.cuda.get_device_name(0)
    assert first["precision"] == "bf16"
