"""What a stage was trained with is compared wherever its weights are used again; content decides, and more is trained.

One process runs all starts, one after the other, as a person would type them; the tests look at what each said.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from models.common.errors import InputError
from tests.support.backbones import make_clip, make_language, tiny_recipe
from tests.support.ranks import run_on_ranks
from tests.support.shards import write_set
from tests.support.training import train
from trainer.checkpoint.reader import CheckpointReader
from trainer.config.recipe import Recipe
from trainer.distributed.context import DistributedContext
from trainer.distributed.preemption import PreemptionHandler
from trainer.distributed.start import Start
from trainer.ledger.audit import audit
from trainer.main import _run_stage
from trainer.replay import replay

pytestmark = pytest.mark.slow


def start(ranks: DistributedContext, recipe: dict[str, Any], stage: str) -> str:
    """What one start says: its log, or the line it is refused with."""
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("trainer")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    begun = Start(ranks, "these tests").open()
    try:
        _run_stage(Recipe.model_validate_json(json.dumps(recipe)), stage, ranks, PreemptionHandler(), begun)
    except InputError as error:
        return f"refused: {error}"
    finally:
        begun.close()
        logger.removeHandler(handler)
    return "\n".join(told)


def varied(recipe: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy with `a.b.c` set; a number is a position in a list."""
    copy: dict[str, Any] = json.loads(json.dumps(recipe))
    for path, value in changes.items():
        *parents, last = path.split(".")
        place: Any = copy
        for key in parents:
            place = place[int(key)] if isinstance(place, list) else place[key]
        place[last] = value
    return copy


def run_all(ranks: DistributedContext, recipe: dict[str, Any], folder: str) -> dict[str, Any]:
    """Every start, in order; what each said by its name."""
    moved = {
        "model.vision.path": f"{folder}/copy/vision",
        "model.language.path": f"{folder}/copy/language",
        "stages.align.data.sources.0.path": f"{folder}/copy/shards",
        "stages.lora.data.sources.0.path": f"{folder}/copy/shards",
    }
    longer = varied(recipe, {"stages.align.duration.count": 4})
    said: dict[str, Any] = {"first": start(ranks, recipe, "align")}
    for name, changes in {
        "same": {},
        "rate": {"stages.align.tune.projector.learning_rate": 2e-2},
        "data": {"stages.align.data.sources.0.path": f"{folder}/other"},
        "shorter": {"stages.align.duration.count": 1},
        "unit": {"stages.align.duration.unit": "samples"},
        "moved": moved,
    }.items():
        said[name] = start(ranks, varied(recipe, changes), "align")
    for name, changes in {
        "lora feature layer": {"model.vision.feature_layer": -1},
        "lora vision": {"model.vision.path": f"{folder}/other_vision"},
        "lora language": {"model.language.path": f"{folder}/other_language"},
        "lora longer align": {"stages.align.duration.count": 4},
    }.items():
        said[name] = start(ranks, varied(recipe, changes), "lora")
    said["recipe"] = json.loads((Path(recipe["run"]) / "recipe.json").read_text())["model"]["vision"]["feature_layer"]
    said["longer"] = start(ranks, longer, "align")
    said["longer again"] = start(ranks, longer, "align")
    said["planned again"] = start(ranks, recipe, "align")
    train(ranks, longer, "lora", stop_after=3)
    said["lora moved"] = start(ranks, varied(longer, moved), "lora")
    alone = varied(longer, {"stages.sft": longer["stages"]["align"]})
    del alone["stages"]["align"], alone["stages"]["lora"]
    said["another recipe"] = start(ranks, alone, "sft")
    other = varied(longer, {"stages.sft": longer["stages"]["align"], "model.projector.kind": "linear"})
    said["another model"] = start(ranks, other, "sft")
    said["replay"] = replay(Recipe.model_validate_json(json.dumps(longer)), "lora", 1).difference
    said["align longer still"] = start(ranks, varied(longer, {"stages.align.duration.count": 5}), "align")
    said["lora from another align"] = start(ranks, varied(longer, {"stages.align.duration.count": 5}), "lora")
    with pytest.raises(InputError) as refused:
        replay(Recipe.model_validate_json(json.dumps(longer)), "lora", 1)
    said["replay from another align"] = str(refused.value)
    return said


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("identity")
    write_set(folder / "shards", [5, 4])
    write_set(folder / "other", [4, 5])
    return folder


@pytest.fixture(scope="module")
def said(folder: Path) -> dict[str, Any]:
    recipe = tiny_recipe(folder, folder / "shards")
    for stage, count in (("align", 2), ("lora", 4)):
        recipe["stages"][stage]["duration"] = {"unit": "steps", "count": count}
    for part in ("vision", "language", "shards"):
        shutil.copytree(folder / part, folder / "copy" / part)
    make_clip(folder / "other_vision", seed=7)
    make_language(folder / "other_language", seed=7)
    (found,) = run_on_ranks(1, run_all, recipe, str(folder))
    return dict(found)


def test_a_finished_stage_is_finished_for_the_same_recipe_and_for_copies_of_its_files(said: dict[str, Any]) -> None:
    assert "finished after 2 steps" in said["first"]
    assert "finished already" in said["same"]
    assert "finished already" in said["moved"]


@pytest.mark.parametrize(
    ("start", "named"),
    [
        ("rate", "tune.projector.learning_rate (0.01 -> 0.02)"),
        ("data", "fingerprint ("),
        ("shorter", "duration.count (2 -> 1)"),
        ("unit", "duration.unit (steps -> samples)"),
        ("planned again", "duration.count (4 -> 2)"),
    ],
)
def test_a_finished_stage_started_otherwise_is_refused(said: dict[str, Any], start: str, named: str) -> None:
    assert said[start].startswith("refused: ")
    assert named in said[start]


@pytest.mark.parametrize(
    ("start", "named"),
    [
        ("lora feature layer", "model.vision.feature_layer (-2 -> -1)"),
        ("lora vision", "base.vision ("),
        ("lora language", "base.language ("),
        ("lora longer align", "duration.count (2 -> 4)"),
    ],
)
def test_a_stage_that_starts_from_another_is_held_to_what_that_was_trained_with(
    said: dict[str, Any], start: str, named: str
) -> None:
    assert said[start].startswith("refused: ")
    assert named in said[start]
    assert said["recipe"] == -2, "what was refused has written nothing"


def test_a_finished_stage_is_trained_for_longer(said: dict[str, Any], folder: Path) -> None:
    assert "going on from" in said["longer"]
    assert "trained for longer, 2 -> 4 steps" in said["longer"]
    assert "the learning rate goes on at 0.524 of its peak, where it was at 0" in said["longer"]
    assert "finished after 4 steps" in said["longer"]
    assert "finished already" in said["longer again"]
    assert audit(folder / "run" / "align").is_clean
    assert (
        CheckpointReader.open(folder / "run" / "align" / "checkpoints" / "step_000004").state["consumed"]["steps"] == 4
    )


def test_a_stopped_stage_goes_on_with_copies_of_its_files(said: dict[str, Any], folder: Path) -> None:
    assert "step_000002" in said["lora moved"]
    assert "finished after 4 steps" in said["lora moved"]
    assert audit(folder / "run" / "lora").is_clean


def test_two_recipes_do_not_share_a_run(said: dict[str, Any]) -> None:
    assert "tiny has no stage align" in said["another recipe"]
    assert "model.projector.kind (mlp -> linear)" in said["another model"]


def test_a_stage_whose_start_was_trained_on_is_told(said: dict[str, Any]) -> None:
    assert said["replay"] == 0.0
    assert "finished after 5 steps" in said["align longer still"]
    for start in ("lora from another align", "replay from another align"):
        assert "start.checkpoint (step_000004 -> step_000005)" in said[start], said[start]
