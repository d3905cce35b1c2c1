"""A language model that is tuned in full in bf16: fp32 masters in its checkpoints, and resumption to the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.backbones import tiny_recipe
from tests.support.ranks import run_on_ranks
from tests.support.shards import write_set
from tests.support.training import losses, same_weights, train_all, vary, weights

FULL = {"kind": "full", "learning_rate": 1e-4}
BF16_GRAIN = 4e-3


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Six steps in bf16 under ZeRO-2 on two ranks; with a restart after four; under ZeRO-3 and 0; and in fp32."""
    folder: Path = tmp_path_factory.mktemp("full")
    write_set(folder / "shards", [5, 1, 9])
    recipe = tiny_recipe(folder, folder / "shards")
    common = {"init": None, "tune": {"projector": FULL, "language": FULL}, "engine__precision": "bf16"}
    made = {
        "whole": vary(recipe, "whole", "lora", **common),
        "resumed": vary(recipe, "resumed", "lora", **common),
        "zero3": vary(recipe, "zero3", "lora", **common, engine__zero="zero3"),
        "zero0": vary(recipe, "zero0", "lora", **common, engine__zero="zero0"),
        "fp32": vary(recipe, "fp32", "lora", **{**common, "engine__precision": "fp32"}),
    }
    stopped = (made["resumed"], "lora", {"stop_after": 4})
    jobs = [(made["whole"], "lora", {}), stopped, (made["resumed"], "lora", {}), (made["zero3"], "lora", {})]
    run_on_ranks(2, train_all, [*jobs, (made["zero0"], "lora", {}), (made["fp32"], "lora", {})])
    return made


@pytest.mark.slow
def test_resumed_is_uninterrupted_bit_for_bit(runs: dict[str, dict[str, Any]]) -> None:
    assert losses(runs["resumed"], "lora") == losses(runs["whole"], "lora")
    same_weights(runs["resumed"], runs["whole"], "lora", rtol=0, atol=0)


@pytest.mark.slow
def test_a_checkpoint_holds_the_fp32_masters(runs: dict[str, dict[str, Any]]) -> None:
    found = weights(runs["whole"], "lora")
    matrices = [weight for name, weight in found.items() if name.startswith("language.") and weight.ndim == 2]
    assert {weight.dtype for weight in found.values()} == {torch.float32}
    assert not any(torch.equal(weight.bfloat16().float(), weight) for weight in matrices)


@pytest.mark.slow
@pytest.mark.parametrize("other", ["zero3", "zero0"])
def test_it_learns_as_under_other_stages(runs: dict[str, dict[str, Any]], other: str) -> None:
    """To bf16's grain, 0.4 %. ZeRO-0 computes in bf16, too, and has fp32 parameters: what differs is masters alone."""
    assert losses(runs["whole"], "lora") == pytest.approx(losses(runs[other], "lora"), rel=BF16_GRAIN)


@pytest.mark.slow
def test_masters_are_as_near_to_fp32_as_fp32_parameters(runs: dict[str, dict[str, Any]]) -> None:
    """Computing in bf16 moves the losses by 1 % in six steps, over fp32 parameters as over masters."""
    expected = losses(runs["fp32"], "lora")
    gaps = {
        name: [abs(found / loss - 1) for found, loss in zip(losses(runs[name], "lora"), expected, strict=True)]
        for name in ("whole", "zero0")
    }
    assert gaps["whole"][0] < BF16_GRAIN
    assert gaps["whole"] == pytest.approx(gaps["zero0"], abs=BF16_GRAIN)
