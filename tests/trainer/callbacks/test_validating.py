"""When a stage is validated and what follows, over fakes."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.fakes import make_run, row
from trainer.callbacks.saving import CheckpointSaving
from trainer.callbacks.validating import Validating
from trainer.config.schema import Validation
from trainer.loop import Loop
from trainer.state import StageRun

BATCHES = [[row(number), ()] for number in range(20)]


class FakeValidator:
    """Gives these losses one after another; None stands for a rank that was asked to stop."""

    answers: tuple[Any, ...] = ()

    def __init__(self, losses: list[float | None], num_asked: int = 0) -> None:
        self.losses, self.num_asked = list(losses), num_asked
        self.steps: list[int] = []
        self.saved: list[list[str]] = []
        """What was committed when each validation began."""
        self.run_of: StageRun | None = None

    def run(self, step: int, should_stop: Any) -> dict[str, float] | None:
        self.steps.append(step)
        if self.run_of is not None:
            self.saved.append(list(self.run_of.services.checkpoints.finished))  # type: ignore[attr-defined]
        for _ in range(self.num_asked):
            should_stop()
        loss = self.losses.pop(0)
        return None if loss is None else {"validation/loss": loss}


def run_with(
    tmp_path: Path, losses: list[float | None], patience: int | None = None, save_every: int = 100
) -> tuple[Loop, StageRun, FakeValidator]:
    stopping = {"early_stopping": {"patience": patience}} if patience is not None else {}
    data = {"sources": [{"path": "none"}], "template": {"kind": "plain"}, "max_length": 64}
    config = Validation.model_validate({"data": data, "every_steps": 2, **stopping}, strict=False)
    run = make_run(tmp_path, BATCHES, recipe={"checkpoint": {"every_steps": save_every}})
    validator = FakeValidator(losses)
    validator.run_of = run
    loop = Loop(run)
    saving = next(callback for callback in loop.callbacks if isinstance(callback, CheckpointSaving))
    found: Any = validator
    loop.callbacks.insert(-1, Validating(found, config, saving))
    return loop, run, validator


def drive(loop: Loop) -> str:
    loop.start()
    while loop.advance() is not None:
        pass
    return loop.end()


def test_it_is_made_at_its_interval_and_at_the_end_and_each_best_is_saved(tmp_path: Path) -> None:
    loop, run, validator = run_with(tmp_path, [3.0, 2.0, 2.5])
    assert drive(loop) == "finished"
    assert validator.steps == [2, 4, 6], "the last step is due, so it is not validated twice"
    checkpoints: Any = run.services.checkpoints
    assert checkpoints.begun == [2, 4, 6]
    assert (run.state.best.step, run.state.best.value, run.state.best.num_worse) == (4, 2.0, 1)


def test_patience_ends_the_stage_as_finished(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    loop, run, validator = run_with(tmp_path, [2.0, 2.1], patience=1)
    assert drive(loop) == "finished"
    assert run.state.consumed.steps == 4
    assert validator.steps == [2, 4]
    assert "finished after 4 steps; validation has stopped getting better" in caplog.text


def test_a_stop_within_a_validation_leaves_it_to_the_next_start(tmp_path: Path) -> None:
    loop, run, _ = run_with(tmp_path, [None])
    assert drive(loop) == "stopped"
    assert run.state.best.last_step == -1
    again, _, validator = run_with(tmp_path / "again", [1.0])
    again.run.state.consumed = run.state.consumed
    again.start()
    assert validator.steps == [run.state.consumed.steps]


def test_callbacks_hear_the_metrics(tmp_path: Path) -> None:
    loop, _, _ = run_with(tmp_path, [3.0, 2.0, 2.5])
    heard: list[Any] = []
    loop.callbacks.append(
        SimpleNamespace(
            **{  # type: ignore[arg-type]
                name: (lambda *arguments, name=name: heard.append(arguments[1]) if name == "on_validation" else None)
                for name in (
                    "on_start",
                    "before_batch",
                    "before_update",
                    "after_batch",
                    "on_validation",
                    "before_finish",
                    "on_end",
                )
            }
        )
    )
    drive(loop)
    assert heard == [{"validation/loss": 3.0}, {"validation/loss": 2.0}, {"validation/loss": 2.5}]


def test_the_checkpoint_that_is_due_is_committed_before_the_validation_that_may_end_the_run(tmp_path: Path) -> None:
    loop, run, validator = run_with(tmp_path, [3.0, 3.5, 2.5], save_every=2)
    assert drive(loop) == "finished"
    names = [f"step_{step:06d}" for step in (2, 4, 6)]
    assert validator.saved == [names[:1], names[:2], names]
    checkpoints: Any = run.services.checkpoints
    assert checkpoints.begun == [2, 4, 6], "the best one is the one that was due"


def test_every_batch_and_every_token_of_a_validation_is_a_sign_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, run, validator = run_with(tmp_path, [3.0, 2.0, 2.5])
    validator.num_asked = 40
    marks: list[str] = []
    monkeypatch.setattr(run.services.watchdog, "mark", lambda phase, step: marks.append(phase))
    drive(loop)
    assert marks.count("validation") == 3 * (1 + 40)


def test_a_start_takes_over_the_validation_that_its_checkpoint_does_not_know(tmp_path: Path) -> None:
    first, run, _ = run_with(tmp_path, [3.0, 2.0, 2.5])
    drive(first)
    (tmp_path / "again").mkdir()
    loop, again, validator = run_with(tmp_path / "again", [])
    again.state.consumed = run.state.consumed
    for name, step in (("older", 4), ("right", 6)):
        with (again.context.directory / "validation.jsonl").open("a") as stream:
            stream.write(f'{{"step": {step}, "validation/loss": 1.5, "name": "{name}"}}\n')
    loop.start()
    assert validator.steps == []
    assert (again.state.best.value, again.state.best.step, again.state.best.last_step) == (1.5, 6, 6)
