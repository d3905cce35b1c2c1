"""Trains a stage of a recipe in this process and says what came out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.common.files import read_lines
from trainer.checkpoint.reader import CheckpointReader
from trainer.config.recipe import Recipe
from trainer.distributed.context import DistributedContext


def vary(recipe: dict[str, Any], run: str, stage: str, **changes: Any) -> dict[str, Any]:
    """A copy of a recipe with another run directory, and `a__b=value` set in one stage."""
    varied: dict[str, Any] = json.loads(json.dumps(recipe))  # stages that share a part share it no more
    varied["run"] = str(Path(recipe["run"]).parent / run)
    for path, value in changes.items():
        *parents, last = path.split("__")
        place = varied["stages"][stage]
        for key in parents:
            place = place.setdefault(key, {})
        place[last] = value
    return varied


def train(
    ranks: DistributedContext,
    recipe: dict[str, Any],
    stage: str,
    *,
    stop_after: int | None = None,
    stop_after_batches: int | None = None,
    change: tuple[Callable[..., None], tuple[Any, ...]] | None = None,
) -> None:
    """Run a stage to its end, or to so many steps or batches as a killed run would: its last checkpoint is what stays.

    `change` is a function and its arguments: it gets the open stage first, and may spoil it.
    """
    from trainer.build import build_stage
    from trainer.loop import fit

    opened = build_stage(Recipe.model_validate_json(json.dumps(recipe)), stage, ranks)
    if change is not None:
        change[0](opened, *change[1])
    try:
        if stop_after is not None:
            _fit_until(opened, lambda: opened.state.consumed.steps == stop_after)
        elif stop_after_batches is not None:
            _fit_until(opened, lambda: opened.state.consumed.batches == stop_after_batches)
        else:
            fit(opened)
    finally:
        opened.close()


class KilledError(Exception):
    """Stands for the end of a process."""


def _fit_until(stage: Any, is_over: Callable[[], bool]) -> None:
    from trainer.loop import fit

    rows = stage.state.stream.next_rows

    def next_rows() -> Any:
        if is_over():
            raise KilledError
        return rows()

    stage.state.stream.next_rows = next_rows
    try:
        fit(stage)
    except KilledError:
        return
    raise AssertionError("the stage ended before it was to be killed")


def train_all(ranks: DistributedContext, jobs: list[tuple[dict[str, Any], str, dict[str, Any]]]) -> None:
    """Several (recipe, stage, options of `train`) one after the other in one process group."""
    for recipe, stage, options in jobs:
        train(ranks, recipe, stage, **options)


def ledger_lines(file: Path) -> list[dict[str, Any]]:
    """The lines of one rank's file of a ledger."""
    from trainer.ledger.restarts import blocks_of

    return [line for block in blocks_of(file) for line in block.lines()]


def events(recipe: dict[str, Any], stage: str) -> list[dict[str, Any]]:
    """What the guard told, in order."""
    return list(read_lines(Path(recipe["run"]) / stage / "events.jsonl"))


def same_weights(left: dict[str, Any], right: dict[str, Any], stage: str, *, rtol: float, atol: float) -> None:
    """Assert that two finished runs ended with the same weights."""
    found, expected = weights(left, stage), weights(right, stage)
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=rtol, atol=atol, msg=f"{name} differs")


def losses(recipe: dict[str, Any], stage: str) -> list[float]:
    """The loss of each step, from the log."""
    lines = (Path(recipe["run"]) / stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


def weights(recipe: dict[str, Any], stage: str) -> dict[str, Tensor]:
    """Every weight of the last checkpoint."""
    finished = json.loads((Path(recipe["run"]) / stage / "finished.json").read_text(encoding="utf-8"))
    reader = CheckpointReader.open(Path(recipe["run"]) / stage / "checkpoints" / finished["checkpoint"])
    return {name: reader.weight(name) for name in reader.names()}
