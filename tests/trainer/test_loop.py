"""The loop over fakes: which callback hears of what, in which order, and how a stage ends."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from models.common.errors import AwayError, InputError
from models.common.files import read_lines
from tests.support.fakes import FakeEngine, make_run, row
from trainer.callbacks.callback import Callback, Ending
from trainer.config.schema import GuardConfig
from trainer.loop import Loop, fit
from trainer.state import StageRun
from trainer.step import GlobalBatch, StepResult

BATCHES = [[row(2 * number), row(2 * number + 1)] for number in range(8)]


class Listener(Callback):
    """Remembers what it heard."""

    def __init__(self) -> None:
        self.heard: list[Any] = []

    def on_start(self, loop: Loop) -> None:
        self.heard.append("start")

    def before_update(self, loop: Loop, batch: GlobalBatch) -> None:
        self.heard.append(("before", loop.run.state.consumed.steps))

    def after_batch(self, loop: Loop, batch: GlobalBatch, result: StepResult) -> None:
        self.heard.append(("after", loop.run.state.consumed.steps, result.is_step))

    def on_validation(self, loop: Loop, metrics: Mapping[str, float]) -> None:
        self.heard.append("validation")

    def before_finish(self, loop: Loop) -> None:
        self.heard.append("before finish")

    def on_end(self, loop: Loop, ending: Ending) -> None:
        self.heard.append(ending)


class Average(Callback):
    """An exponential moving average of the weight: what somebody else would write, in a file of their own."""

    def __init__(self, decay: float) -> None:
        self.decay, self.value = decay, math.nan

    def on_start(self, loop: Loop) -> None:
        self.value = loop.run.services.engine.weight  # type: ignore[attr-defined]

    def after_batch(self, loop: Loop, batch: GlobalBatch, result: StepResult) -> None:
        if result.is_step:
            weight = loop.run.services.engine.weight  # type: ignore[attr-defined]
            self.value = self.decay * self.value + (1 - self.decay) * weight


def checkpoints(run: StageRun) -> Any:
    return run.services.checkpoints


def test_a_stage_runs_to_its_end_and_callbacks_hear_all_of_it(tmp_path: Path) -> None:
    run, listener = make_run(tmp_path, BATCHES), Listener()
    assert fit(run, [listener]) == "finished"
    steps = [heard for step in range(6) for heard in (("before", step), ("after", step + 1, True))]
    assert listener.heard == ["start", *steps, "before finish", "finished"]
    assert checkpoints(run).finished == ["step_000002", "step_000004", "step_000006"]
    finished = json.loads((run.context.directory / "finished.json").read_text())
    assert finished == {"checkpoint": "step_000006", "steps": 6, "samples": 12}
    logged = list(read_lines(run.context.directory / "metrics.jsonl"))
    assert [line["step"] for line in logged] == [1, 2, 3, 4, 5, 6]
    assert logged[0]["learning_rate"] == 0.5
    assert logged[0]["loss"] == 1.0


def test_an_average_of_weights_is_a_callback_in_a_file_of_its_own(tmp_path: Path) -> None:
    run, average = make_run(tmp_path, BATCHES), Average(0.5)
    fit(run, [average])
    expected, weight = 1.0, 1.0
    for _ in range(6):
        weight -= 0.01 * weight
        expected = 0.5 * expected + 0.5 * weight
    assert average.value == pytest.approx(expected, rel=1e-5)


def test_a_stage_in_epochs_ends_with_its_data(tmp_path: Path) -> None:
    run = make_run(tmp_path, BATCHES, recipe={"duration": {"unit": "epochs", "count": 1}})
    assert fit(run) == "finished"
    assert run.state.consumed.steps == len(BATCHES)


def test_a_stop_is_saved_and_no_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    run = make_run(tmp_path, BATCHES)

    class Stopper(Callback):
        def before_update(self, loop: Loop, batch: GlobalBatch) -> None:
            if loop.run.state.consumed.steps == 2:
                loop.run.services.preemption.reason = "SIGTERM"

    listener = Listener()
    assert fit(run, [Stopper(), listener]) == "stopped"
    assert "before finish" not in listener.heard
    assert checkpoints(run).finished[-1] == f"step_{run.state.consumed.steps:06d}"
    assert not (run.context.directory / "finished.json").exists()
    assert "stopped by SIGTERM after step" in caplog.text


def test_a_skipped_batch_is_counted_told_and_not_learnt_from(tmp_path: Path) -> None:
    engine = FakeEngine()
    run, listener = make_run(tmp_path, BATCHES, engine), Listener()
    backward = engine.backward

    def spoilt(*arguments: Any) -> None:
        engine.gradient_factor = math.inf if run.state.consumed.batches == 1 else 1.0
        backward(*arguments)

    engine.backward = spoilt  # type: ignore[method-assign]
    assert fit(run, [listener]) == "finished"
    assert ("after", 1, False) in listener.heard
    assert (run.state.consumed.steps, run.state.consumed.batches) == (6, 7)
    events = list(read_lines(run.context.directory / "events.jsonl"))
    assert [event["event"] for event in events if event["event"] == "skipped"] == ["skipped"]


def test_a_checkpoint_that_cannot_be_written_is_a_warning_until_the_last_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    run = make_run(tmp_path, BATCHES)
    checkpoints(run).fault = "no space"
    with pytest.raises(InputError, match="the last checkpoint could not be written"):
        fit(run)
    assert caplog.text.count("no space; training goes on") == 3


def test_steps_that_cannot_be_taken_end_the_run_where_there_is_no_way_back(tmp_path: Path) -> None:
    engine = FakeEngine()
    engine.gradient_factor = math.nan
    run = make_run(tmp_path, BATCHES, engine, guard=GuardConfig(max_skips=3))
    with pytest.raises(InputError, match="3 steps in a row could not be taken"):
        fit(run)
    assert engine.weight == 1.0


def away_after(run: StageRun, num_batches: int) -> list[str]:
    """The run's data go away after so many batches; the list hears of what is taken back."""
    stream, heard = run.state.stream, list[str]()
    draw = stream.next_rows

    def next_rows() -> Any:
        if run.state.consumed.batches == num_batches:
            raise AwayError("https://host/set has been away")
        return draw()

    stream.next_rows = next_rows  # type: ignore[method-assign]
    stream.take_back = lambda: heard.append("taken back")  # type: ignore[method-assign]
    return heard


def test_data_that_are_away_stop_the_run_saved_and_unfinished(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    run = make_run(tmp_path, BATCHES)
    heard = away_after(run, 3)
    assert fit(run) == "stopped"
    assert heard == ["taken back"]
    checkpoints: Any = run.services.checkpoints
    assert checkpoints.begun == [2, 3]
    assert "stopped by https://host/set has been away after step 3; saved in" in caplog.text


def test_data_that_are_away_before_the_first_batch_leave_nothing_to_save(tmp_path: Path) -> None:
    run = make_run(tmp_path, BATCHES)
    away_after(run, 0)
    with pytest.raises(AwayError):
        fit(run)
    checkpoints: Any = run.services.checkpoints
    assert checkpoints.begun == []
