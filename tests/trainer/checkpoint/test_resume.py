"""The checkpoint that a stage resumes from: the newest complete one, and one of this stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from models.common.errors import InputError
from tests.support.checkpoints import write_checkpoint
from trainer.checkpoint.resume import resume_point
from trainer.distributed.context import DistributedContext

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


def test_the_newest_sound_one_is_taken_and_none_sound_is_no_new_beginning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert resume_point(tmp_path, RECORD, DistributedContext()) is None
    for step in (1, 2):
        write_checkpoint(tmp_path / "checkpoints", step, fragments=[], inherited={}, state=RECORD)
    (tmp_path / "checkpoints/step_000002/COMMIT").unlink()
    reader = resume_point(tmp_path, RECORD, DistributedContext())
    assert reader is not None
    assert reader.directory.name == "step_000001"
    assert "step_000002: it has no COMMIT" in caplog.text
    (tmp_path / "checkpoints/step_000001/state.json").write_text("{}")
    with pytest.raises(InputError, match="no checkpoint here is sound: restore one, or start anew with run="):
        resume_point(tmp_path, RECORD, DistributedContext())


def test_a_checkpoint_of_another_stage_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "align" / "checkpoints", 1, fragments=[], inherited={}, state=RECORD)
    other = {**RECORD, "seed": 1}
    with pytest.raises(
        InputError, match=r"step_000001: made with another seed \(0 -> 1\); take those of .*recipe\.json"
    ):
        resume_point(tmp_path / "align", other, DistributedContext())
