"""Validation takes benchmarks and retrieval by name, in a stage that answers and in one that compares images and texts.

Two ranks see what one rank sees, with weights that are divided (ZeRO-3).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from models.common.errors import InputError
from models.common.files import read_lines
from tests.support.backbones import tiny_recipe
from tests.support.benchmarks import TinyBenchmark, make_benchmark
from tests.support.qformer import qformer_recipe
from tests.support.ranks import run_on_ranks
from tests.support.shards import write_set
from tests.support.training import train_all, vary
from trainer.config.recipe import Recipe
from trainer.distributed.context import DistributedContext
from trainer.inputs import read_inputs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("benchmarks")
    write_set(found / "shards", [7, 5])
    return found


@pytest.fixture(scope="module")
def tiny(folder: Path) -> TinyBenchmark:
    made = make_benchmark(folder)
    lines = [
        {"question_id": place, "image": f"scene_{place:012d}.png", "text": text, "label": "no"}
        for place, text in enumerate(["Is it red?", "Is it lime?", "Is it " + "very " * 500 + "blue?"])
    ]
    (folder / "coco_pope_random.json").write_text("\n".join(map(json.dumps, lines)))
    return made


def pope(tiny: TinyBenchmark) -> dict[str, Any]:
    files = [str(tiny.folder / "coco_pope_random.json")]
    options = {"images": str(tiny.images), "max_new_tokens": 2}
    return {"kind": "benchmark", "benchmark": "pope", "questions": files, **options}


def retrieval(tiny: TinyBenchmark) -> dict[str, Any]:
    return {"kind": "retrieval", "captions": str(tiny.captions), "images": str(tiny.images)}


def validated(recipe: dict[str, Any], run: str, stage: str, task: dict[str, Any], **changes: Any) -> dict[str, Any]:
    data = recipe["stages"][stage]["data"]
    metric = {"benchmark": "pope/accuracy", "retrieval": "retrieval/text_to_image/recall_at_1"}[task["kind"]]
    validation = {
        "data": data,
        "every_steps": 2,
        "num_samples": 4,
        "tasks": [task],
        "metric": f"validation/{metric}",
    }
    return vary(recipe, run, stage, validation=validation, duration={"unit": "steps", "count": 2}, **changes)


def measured(recipe: dict[str, Any], stage: str) -> dict[str, float]:
    (line,) = read_lines(Path(recipe["run"]) / stage / "validation.jsonl")
    return {name: value for name, value in line.items() if "/pope/" in name or "/retrieval/" in name}


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["align", "contrast"])
def test_a_stage_measures_by_name_on_any_number_of_ranks(folder: Path, tiny: TinyBenchmark, stage: str) -> None:
    answers = stage == "align"
    recipe = (tiny_recipe if answers else qformer_recipe)(folder / stage, folder / "shards")
    task = pope(tiny) if answers else retrieval(tiny)
    one, two = (
        validated(recipe, f"{stage}_{name}", stage, task, engine__zero=zero)
        for name, zero in (("one", "zero0"), ("two", "zero3"))
    )
    run_on_ranks(1, train_all, [(one, stage, {})])
    run_on_ranks(2, train_all, [(two, stage, {})])
    found = measured(one, stage)
    assert one["stages"][stage]["validation"]["metric"] in found
    assert found == pytest.approx(measured(two, stage))
    assert all(0 <= value <= 1 for value in found.values())
    if answers:
        page = next((Path(one["run"]) / stage / "validation").glob("*.html")).read_text()
        assert "1 questions cannot be asked" in page


def test_a_task_that_the_stages_model_cannot_be_asked_is_refused_at_the_start(
    folder: Path, tiny: TinyBenchmark
) -> None:
    chat = tiny_recipe(folder / "chat_wrong", folder / "shards")
    pairs = qformer_recipe(folder / "pairs_wrong", folder / "shards")
    for recipe, stage, task, reason in (
        (chat, "align", retrieval(tiny), "it compares vectors"),
        (pairs, "contrast", pope(tiny), "no language model answers"),
    ):
        wrong = validated(recipe, "wrong", stage, task)
        with pytest.raises(InputError, match=rf"stages\.{stage}\.validation\.tasks: \w+: {reason}"):
            read_inputs(Recipe.model_validate_json(json.dumps(wrong)), stage, DistributedContext())
