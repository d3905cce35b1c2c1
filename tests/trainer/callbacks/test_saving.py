"""When checkpoints begin and are committed, over fakes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.support.fakes import FakeCheckpoints, make_run
from trainer.callbacks.saving import CheckpointSaving
from trainer.state import StageRun

LOOP: Any = None


def saving(tmp_path: Path, every_steps: int = 2) -> tuple[CheckpointSaving, StageRun, FakeCheckpoints]:
    run = make_run(tmp_path, [], recipe={"checkpoint": {"every_steps": every_steps}})
    checkpoints: Any = run.services.checkpoints
    return CheckpointSaving(run), run, checkpoints


def take_step(found: CheckpointSaving, run: StageRun, *, num_written: float, is_step: bool = True) -> None:
    if is_step:
        run.state.consumed = run.state.consumed.learnt(samples=1, tokens=1, draws=1)
    result: Any = SimpleNamespace(totals=SimpleNamespace(num_written=num_written), is_step=is_step)
    batch: Any = None
    found.after_batch(LOOP, batch, result)


def test_a_checkpoint_is_committed_by_the_first_batch_after_which_every_rank_has_written(tmp_path: Path) -> None:
    found, run, checkpoints = saving(tmp_path)
    take_step(found, run, num_written=1)
    take_step(found, run, num_written=1)
    assert (checkpoints.begun, checkpoints.finished) == ([2], [])
    take_step(found, run, num_written=0)
    assert checkpoints.finished == [], "a rank is still writing"
    take_step(found, run, num_written=1, is_step=False)
    assert checkpoints.finished == ["step_000002"], "a skipped batch says so too"
    assert found.latest == run.context.directory / "checkpoints" / "step_000002"


def test_the_next_one_waits_for_the_one_on_its_way(tmp_path: Path) -> None:
    found, run, checkpoints = saving(tmp_path, every_steps=1)
    take_step(found, run, num_written=0)
    take_step(found, run, num_written=0)
    assert (checkpoints.begun, checkpoints.finished) == ([1, 2], ["step_000001"])


def test_a_state_is_saved_once(tmp_path: Path) -> None:
    found, run, checkpoints = saving(tmp_path)
    take_step(found, run, num_written=1)
    found.save()
    found.save()
    assert checkpoints.begun == [1]
    found.settle()
    found.after_rollback(LOOP)
    found.save()
    assert checkpoints.begun == [1], "what a run went back to is saved already"


def test_a_run_can_go_back_to_what_was_committed_or_is_on_its_way(tmp_path: Path) -> None:
    found, run, _ = saving(tmp_path)
    assert not found.can_go_back
    take_step(found, run, num_written=1)
    found.save()
    assert found.can_go_back
    found.settle()
    assert found.can_go_back
