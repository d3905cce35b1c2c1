"""Trains a stage of a recipe in this process and says what came out."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer.checkpoint import CheckpointReader
from trainer.ranks import Ranks
from trainer.recipe import Recipe


def vary(recipe: dict[str, Any], run: str, stage: str, **changes: Any) -> dict[str, Any]:
    """A copy of a recipe with another run directory, and `a__b=value` set in one stage."""
    varied = copy.deepcopy(recipe)
    varied["run"] = str(Path(recipe["run"]).parent / run)
    for path, value in changes.items():
        *parents, last = path.split("__")
        place = varied["stages"][stage]
        for key in parents:
            place = place.setdefault(key, {})
        place[last] = value
    return varied


def train(ranks: Ranks, recipe: dict[str, Any], stage: str, *, stop_after: int | None = None) -> None:
    """Run a stage to its end, or to `stop_after` steps as a killed run would: the last checkpoint is all that stays."""
    from trainer.loop import fit
    from trainer.stage import open_stage

    opened = open_stage(Recipe.model_validate_json(json.dumps(recipe)), stage, ranks)
    try:
        if stop_after is None:
            fit(opened)
        else:
            _fit_until(opened, stop_after)
    finally:
        opened.close()


class KilledError(Exception):
    """Stands for the end of a process."""


def _fit_until(stage: Any, steps: int) -> None:
    from trainer.loop import fit

    rows = stage.stream.next_rows

    def next_rows() -> Any:
        if stage.consumed.steps == steps:
            raise KilledError
        return rows()

    stage.stream.next_rows = next_rows
    try:
        fit(stage)
    except KilledError:
        return
    raise AssertionError("the stage ended before it was to be killed")


def train_all(ranks: Ranks, jobs: list[tuple[dict[str, Any], str, dict[str, Any]]]) -> None:
    """Several (recipe, stage, options of `train`) one after the other in one process group."""
    for recipe, stage, options in jobs:
        train(ranks, recipe, stage, **options)


def losses(recipe: dict[str, Any], stage: str) -> list[float]:
    """The loss of each step, from the log."""
    lines = (Path(recipe["run"]) / stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


def weights(recipe: dict[str, Any], stage: str) -> dict[str, Tensor]:
    """Every weight of the last checkpoint."""
    finished = json.loads((Path(recipe["run"]) / stage / "finished.json").read_text(encoding="utf-8"))
    reader = CheckpointReader(Path(recipe["run"]) / stage / "checkpoints" / finished["checkpoint"])
    return {name: reader.weight(name) for name in reader.names()}
