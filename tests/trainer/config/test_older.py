"""A run that an earlier version began goes on with what that version did where neither recipe nor record has a word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.backbones import write_recipe
from trainer.checkpoint.identity import compare, record_of
from trainer.config.recipe import Recipe, load_recipe

DATA = {"sources": [{"path": "a"}], "template": {"kind": "plain"}, "max_length": 64}
STAGE: dict[str, Any] = {
    "tune": {"projector": {"kind": "full", "learning_rate": 1e-3}},
    "data": DATA,
    "duration": {"unit": "steps", "count": 2},
    "batch": {"global_rows": 2, "micro_rows": 2},
    "validation": {"data": DATA, "every_steps": 1},
}
MODEL = {
    "vision": {"kind": "clip", "path": "v", "feature_layer": -2},
    "projector": {"kind": "mlp"},
    "language": {"kind": "pretrained", "path": "l"},
}


def openings(recipe: Recipe) -> list[Any]:
    """Of every stage: that of training, that of validation."""
    stages = recipe.stages.values()
    data = [each for stage in stages if stage.validation is not None for each in (stage.data, stage.validation.data)]
    return [getattr(each.template, "opening", None) for each in data]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    recipe = {"name": "older", "run": str(tmp_path / "run"), "model": MODEL, "stages": {"align": STAGE, "more": STAGE}}
    return write_recipe(tmp_path / "recipe.yaml", recipe)


def record(recipe: Recipe, *, older: bool) -> Path:
    """RUN/recipe.json, as this version writes it or as one without openings did."""
    values = recipe.model_dump(mode="json")
    if older:
        for stage in values["stages"].values():
            for data in (stage["data"], stage["validation"]["data"]):
                del data["template"]["opening"]
    path = Path(recipe.run) / "recipe.json"
    path.parent.mkdir()
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def test_a_new_run_opens_as_the_default_says(file: Path) -> None:
    assert openings(load_recipe(file)) == [True] * 4


def test_an_older_run_keeps_its_image_at_the_front(file: Path) -> None:
    stored = record(load_recipe(file), older=True)
    assert openings(load_recipe(file)) == [""] * 4
    assert openings(load_recipe(stored)) == [""] * 4
    elsewhere = stored.rename(stored.with_name("moved")).rename(file.parent / "recipe.json")
    assert openings(load_recipe(elsewhere)) == [""] * 4  # a merge of a directory that was moved


def test_what_a_recipe_says_itself_stands(file: Path) -> None:
    record(load_recipe(file), older=True)
    given = load_recipe(file, ["stages.align.data.template.opening='Look: '"])
    assert openings(given) == ["Look: ", "", "", ""]


def test_a_run_of_this_version_keeps_the_default(file: Path) -> None:
    record(load_recipe(file), older=False)
    assert openings(load_recipe(file)) == [True] * 4


def test_a_run_begun_when_null_was_the_default_keeps_it(file: Path) -> None:
    path = record(load_recipe(file), older=False)
    path.write_text(path.read_text().replace('"opening": true', '"opening": null'), encoding="utf-8")
    assert openings(load_recipe(file)) == [None] * 4
    given = load_recipe(file, ["stages.align.data.template.opening='Look: '"])
    assert openings(given) == ["Look: ", None, None, None]


def test_a_text_that_a_run_was_begun_with_is_not_taken_from_it(file: Path) -> None:
    record(load_recipe(file, ["stages.align.data.template.opening='Look: '"]), older=False)
    assert openings(load_recipe(file)) == [True] * 4  # what has changed since is refused where the run goes on


@pytest.mark.parametrize("content", ["", "[]", '{"stages": 3}', '{"stages": {"align": []}}'])
def test_a_record_that_is_none_says_nothing(file: Path, content: str) -> None:
    record(load_recipe(file), older=True).write_text(content, encoding="utf-8")
    assert openings(load_recipe(file)) == [True] * 4


def test_an_older_checkpoint_is_taken_with_its_opening_and_no_other(file: Path) -> None:
    before = json.loads(json.dumps(record_of(load_recipe(file), "align")))
    del before["config"]["data"]["template"]["opening"]
    record(load_recipe(file), older=True)
    now = record_of(load_recipe(file), "align")
    assert not [each for each in compare(before, now) if each.is_refused(may_grow=True)]
    other = record_of(load_recipe(file, ["stages.align.data.template.opening='Look: '"]), "align")
    refused = [each for each in compare(before, other) if each.is_refused(may_grow=True)]
    assert [(each.name, each.before, each.now) for each in refused] == [("data.template.opening", "", "Look: ")]
