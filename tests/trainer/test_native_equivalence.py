"""One run of a model of native resolution, however it is cut.

What `test_equivalence.py` claims of every ZeRO stage holds of flat parameters, whatever the model; here is what depends
on the model: patches that are laid out for each micro-batch, and parameters that are gathered layer by layer.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.native import NATIVE
from tests.support.published import published_recipe
from tests.support.ranks import run_on_ranks
from tests.support.shards import write_mixed_set, write_set
from tests.support.training import losses, same_weights, train_all, vary, weights

Runs = dict[str, dict[str, Any]]
ROUNDING = {"rtol": 2e-4, "atol": 2e-5}
"""As in `test_equivalence.py`."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=NATIVE[1:])
def runs(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Runs:
    """Every run that the tests compare, made in process groups of two ranks and of one."""
    folder = tmp_path_factory.mktemp("native")
    write_set(folder / "shards", [5, 1, 9])
    write_mixed_set(folder / "mixed")
    recipe = published_recipe(folder, folder / "shards", request.param)
    one: list[tuple[dict[str, Any], str, dict[str, Any]]] = [(recipe, "align", {}), (recipe, "lora", {})]
    two = []
    made = {"one": recipe}

    def add(jobs: list[Any], name: str, stage: str = "align", *, stops: bool = False, **changes: Any) -> None:
        made[name] = vary(recipe, name, stage, **changes)
        jobs += [(made[name], stage, {"stop_after": 3})] if stops else []
        jobs.append((made[name], stage, {}))

    add(one, "micro_1", batch__micro_rows=1)
    add(one, "broken_zero3", stops=True, engine__zero="zero3")
    for zero in ("zero2", "zero3"):
        add(two, f"two_{zero}", engine__zero=zero)
    adapted: dict[str, Any] = {"init": None, "engine__precision": "bf16", "tune__language__dropout": 0.1}
    add(two, "whole_bf16", "lora", **adapted)
    add(two, "broken_bf16", "lora", stops=True, **adapted)
    mixed: dict[str, Any] = {"data__sources": [{"path": str(folder / "mixed")}]}
    packed = {**mixed, "data__packing": {"kind": "pack", "row_tokens": 256, "lookahead": 3}}
    for name, changes in (("mixed", mixed), ("packed", packed)):
        add(one, f"{name}_1", **changes)
        add(two, f"{name}_2", **changes, engine__zero="zero3", batch__micro_rows=1)
    torch.manual_seed(0)
    run_on_ranks(2, train_all, two)
    run_on_ranks(1, train_all, one)
    return made


@pytest.mark.parametrize("name", ["two_zero2", "two_zero3", "micro_1", "broken_zero3"])
def test_ranks_micro_batches_and_a_kill_change_nothing(runs: Runs, name: str) -> None:
    assert losses(runs[name], "align") == pytest.approx(losses(runs["one"], "align"), rel=1e-5)
    same_weights(runs[name], runs["one"], "align", **ROUNDING)


def test_resumed_is_uninterrupted_bit_for_bit(runs: Runs) -> None:
    assert losses(runs["broken_bf16"], "lora") == losses(runs["whole_bf16"], "lora")
    same_weights(runs["broken_bf16"], runs["whole_bf16"], "lora", rtol=0, atol=0)


@pytest.mark.parametrize("name", ["mixed", "packed"])
def test_rows_without_images_hold_nobody_up(runs: Runs, name: str) -> None:
    assert losses(runs[f"{name}_2"], "align") == pytest.approx(losses(runs[f"{name}_1"], "align"), rel=1e-5)
    same_weights(runs[f"{name}_2"], runs[f"{name}_1"], "align", **ROUNDING)


def test_both_stages_learn(runs: Runs) -> None:
    trace, adapted = losses(runs["one"], "align"), weights(runs["one"], "lora")
    assert trace[-1] < trace[0] - 0.3
    assert losses(runs["one"], "lora")[0] < trace[0]
    up = [value for name, value in adapted.items() if "lora_B" in name and name.startswith("language")]
    assert len(up) == 21  # seven linear layers in each of three decoder layers
    assert all(float(value.norm()) > 0 for value in up)
