"""The table on resume: field by field what must match, what is converted, what is free."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from models.errors import InputError
from tests.support.checkpoints import write_checkpoint
from trainer.ranks import Ranks
from trainer.resume import check_same, compare, resume_point

RECORD: dict[str, Any] = {
    "seed": 0,
    "model": {"language": "vicuna"},
    "base": {"language": "abc"},
    "world_size": 2,
    "config": {
        "batch": {"global_rows": 8, "micro_rows": 2},
        "data": {"num_workers": 2, "max_length": 64},
        "engine": {"zero": "zero2"},
        "checkpoint": {"keep": 2},
        "schedule": {"kind": "cosine"},
    },
}


def changed(**changes: Any) -> dict[str, Any]:
    config = {name: {**value, **changes.get(name, {})} for name, value in RECORD["config"].items()}
    return {**RECORD, **{name: value for name, value in changes.items() if name in RECORD}, "config": config}


def test_each_field_has_its_rule() -> None:
    now = changed(
        world_size=4, batch={"global_rows": 16, "micro_rows": 1}, data={"num_workers": 0}, engine={"zero": "zero3"},
        checkpoint={"keep": 9},
    )  # fmt: skip
    table = compare(RECORD, now)
    differing = {field.name: field.rule for field in table if field.differs}
    assert differing == {
        "world_size": "converted",
        "batch": "must match",
        "batch.micro_rows": "converted",
        "data.num_workers": "converted",
        "engine": "converted",
        "checkpoint": "free",
    }
    lines = {field.name: field.line() for field in table}
    assert " ".join(lines["batch"].split()) == "batch must match DIFFERS: {'global_rows': 8} -> {'global_rows': 16}"
    assert lines["seed"].split() == ["seed", "must", "match", "same"]
    with pytest.raises(InputError, match=r"step_000001: made with another batch; take those of .*recipe\.json"):
        check_same(table, Path("run/align/checkpoints/step_000001"))


@pytest.mark.parametrize("name", ["seed", "base", "model", "data", "schedule"])
def test_what_the_numbers_depend_on_must_match(name: str) -> None:
    values: dict[str, Any] = {"seed": 1, "base": {"language": "other"}, "model": {}, "data": {"max_length": 32},
                              "schedule": {"kind": "linear"}}  # fmt: skip
    table = compare(RECORD, changed(**{name: values[name]}))
    assert [field.name for field in table if field.differs and field.rule == "must match"] == [name]


def test_the_newest_sound_one_is_taken_and_none_sound_is_no_new_beginning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert resume_point(tmp_path, RECORD, Ranks()) is None
    for step in (1, 2):
        write_checkpoint(tmp_path / "checkpoints", step, fragments=[], given={}, state=RECORD)
    (tmp_path / "checkpoints/step_000002/COMMIT").unlink()
    reader = resume_point(tmp_path, RECORD, Ranks())
    assert reader is not None
    assert reader.directory.name == "step_000001"
    assert "step_000002: it has no COMMIT" in capsys.readouterr().out
    (tmp_path / "checkpoints/step_000001/state.json").write_text("{}")
    with pytest.raises(InputError, match="no checkpoint here is sound: restore one, or start anew with run="):
        resume_point(tmp_path, RECORD, Ranks())
