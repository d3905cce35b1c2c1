"""The one comparison of weights with a recipe: what must match, what is converted, what is free, and what decides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from models.common.errors import InputError
from trainer.checkpoint.identity import check, compare, start_of

RECORD: dict[str, Any] = {
    "seed": 0,
    "model": {
        "vision": {"kind": "clip", "path": "clip", "feature_layer": -2},
        "projector": {"kind": "qformer", "path": "bert"},
        "language": {"kind": "pretrained", "path": "vicuna"},
    },
    "base": {"vision": "aa", "language": "bb"},
    "files": {"tokenizer": "tt", "projector": "pp"},
    "fingerprint": "ff",
    "image": {"size": 336},
    "text": {"vocab_size": 32000},
    "start": {"stage": "align", "checkpoint": "step_000009", "id": "1"},
    "world_size": 2,
    "config": {
        "init": "align",
        "batch": {"global_rows": 8, "micro_rows": 2},
        "data": {
            "num_workers": 2, "max_length": 64, "bad_share_limit": 0.05,
            "sources": [{"path": "shards", "cache": None, "cache_gb": 100.0, "weight": None}],
        },
        "duration": {"unit": "steps", "count": 6},
        "engine": {"zero": "zero2"},
        "checkpoint": {"keep": 2},
        "schedule": {"kind": "cosine"},
        "validation": None,
    },
}  # fmt: skip


def varied(**changes: Any) -> dict[str, Any]:
    """The record with `a__b=value` set."""
    record: dict[str, Any] = json.loads(json.dumps(RECORD))
    for path, value in changes.items():
        *parents, last = path.split("__")
        place: Any = record
        for key in parents:
            place = place[int(key)] if isinstance(place, list) else place[key]
        place[last] = value
    return record


def differing(before: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    return {field.name: field.rule for field in compare(before, now) if field.differs}


def refused(before: dict[str, Any], now: dict[str, Any], **options: Any) -> str:
    with pytest.raises(InputError) as error:
        check(compare(before, now), Path("run/align/checkpoints/step_000001"), Path("run/recipe.json"), **options)
    return str(error.value)


def test_each_field_has_its_rule() -> None:
    now = varied(
        world_size=4, config__batch={"global_rows": 16, "micro_rows": 1}, config__data__num_workers=0,
        config__engine={"zero": "zero3"}, config__checkpoint={"keep": 9}, config__validation={"every_steps": 5},
        config__data__sources__0__cache="/scratch", config__data__sources__0__cache_gb=5.0,
        config__data__bad_share_limit=0.5,
    )  # fmt: skip
    assert differing(RECORD, now) == {
        "world_size": "converted",
        "batch.global_rows": "must match",
        "batch.micro_rows": "converted",
        "data.num_workers": "converted",
        "data.sources.0.cache": "free",
        "data.sources.0.cache_gb": "free",
        "data.bad_share_limit": "free",
        "engine.zero": "converted",
        "checkpoint.keep": "free",
        "validation": "free",
    }
    lines = {field.name: " ".join(field.line().split()) for field in compare(RECORD, now)}
    assert lines["batch.global_rows"] == "batch.global_rows must match DIFFERS: 8 -> 16"
    assert lines["seed"] == "seed must match same"
    told = refused(RECORD, now)
    assert told == (
        "run/align/checkpoints/step_000001: made with another batch.global_rows (8 -> 16); take those of "
        "run/recipe.json, or start anew with run=ANOTHER_DIRECTORY"
    )


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"seed": 1}, "seed"),
        ({"model__vision__feature_layer": -1}, "model.vision.feature_layer"),
        ({"model__vision__kind": "siglip"}, "model.vision.kind"),
        ({"base__language": "other"}, "base.language"),
        ({"files__tokenizer": "other"}, "files.tokenizer"),
        ({"fingerprint": "other"}, "fingerprint"),
        ({"image__size": 224}, "image.size"),
        ({"text__vocab_size": 32001}, "text.vocab_size"),
        ({"start__checkpoint": "step_000012"}, "start.checkpoint"),
        ({"start__id": "2"}, "start.id"),
        ({"config__data__max_length": 32}, "data.max_length"),
        ({"config__data__sources": []}, "data.sources"),
        ({"config__schedule__kind": "linear"}, "schedule.kind"),
        ({"config__init": None}, "init"),
        ({"config__duration__unit": "epochs"}, "duration.unit"),
        ({"config__duration__count": 5}, "duration.count"),
    ],
)
def test_what_the_weights_depend_on_must_match(change: dict[str, Any], name: str) -> None:
    now = varied(**change)
    assert name in differing(RECORD, now)
    assert f"made with another {name} (" in refused(RECORD, now)


def test_content_decides_and_not_the_path() -> None:
    now = varied(
        model__vision__path="/scratch/clip", model__language__path="/scratch/vicuna", model__projector__path="copy",
        config__data__sources__0__path="/scratch/shards",
    )  # fmt: skip
    assert differing(RECORD, now) == {}
    assert set(differing(RECORD, {**now, "base": {"vision": "aa"}, "files": {}})) == {
        "model.language.path",
        "model.projector.path",
    }
    del now["fingerprint"]
    assert set(differing(RECORD, now)) == {"data.sources.0.path"}


def test_a_record_of_an_older_version_is_compared_by_what_it_says() -> None:
    older = {name: RECORD[name] for name in ("seed", "model", "base", "config", "world_size")}
    older["stream"] = {"fingerprint": "ff"}
    older["config"] = {name: value for name, value in RECORD["config"].items() if name != "schedule"}
    assert differing(older, RECORD) == {}
    moved = varied(config__data__sources__0__path="elsewhere")
    assert differing(older, moved) == {}
    assert set(differing(older, {**moved, "fingerprint": "other"})) == {"fingerprint"}
    assert set(differing(older, varied(model__projector__path="copy"))) == {"model.projector.path"}
    assert differing({"base": RECORD["base"], "config": {}}, RECORD) == {}


def test_a_longer_duration_is_a_plan_but_not_for_weights_that_count_as_finished() -> None:
    longer = varied(config__duration__count=12)
    table = compare(RECORD, longer)
    check(table, Path("run/align/checkpoints/step_000006"), Path("run/recipe.json"))
    (field,) = (field for field in table if field.differs)
    assert field.is_longer
    assert " ".join(field.line().split()) == "duration.count may grow longer: 6 -> 12"
    assert "duration.count (6 -> 12)" in refused(RECORD, longer, may_grow=False)


def test_what_a_stage_starts_from_is_named_by_its_id() -> None:
    checkpoint = Path("run/align/checkpoints/step_000006")
    assert start_of(checkpoint, {}) == {"stage": "align", "checkpoint": "step_000006"}
    assert start_of(checkpoint, {"id": "x"})["id"] == "x"
