"""The best validation so far: values of one measure are compared, those of another are kept beside them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.fakes import make_run, row
from trainer.build import choose_measure
from trainer.distributed.context import DistributedContext
from trainer.validation.best import Best

LOSS, ACCURACY = "validation/loss 0123456789ab", "validation/token_accuracy 0123456789ab"


def best_by_loss() -> Best:
    best = Best(measure=LOSS)
    for step, value in ((2, 3.0), (4, 1.5), (6, 1.75)):
        best.offer(value, step, lower_is_better=True)
    return best


def test_another_measure_begins_without_a_best() -> None:
    """An accuracy of 0.5 is the first of its kind: it is neither compared with a loss of 1.5, nor worse."""
    best = best_by_loss().measured_by(ACCURACY)
    assert (best.value, best.num_worse, best.last_step) == (None, 0, -1)
    assert best.offer(0.5, 6, lower_is_better=False)
    assert (best.value, best.step, best.num_worse) == (0.5, 6, 0)


def test_each_measure_finds_its_best_again_and_every_best_is_spared() -> None:
    best = best_by_loss().measured_by(ACCURACY)
    best.offer(0.5, 6, lower_is_better=False)
    assert sorted(best.steps) == [4, 6]
    stored = Best(**json.loads(json.dumps(best.state_dict())))
    again = stored.measured_by(LOSS)
    assert (again.value, again.step, again.num_worse, again.last_step) == (1.5, 4, 1, 6)
    assert again.measured_by(ACCURACY) == stored


def test_the_same_metric_on_other_data_is_another_measure() -> None:
    best = best_by_loss().measured_by("validation/loss ba9876543210")
    assert best.value is None
    assert best.measured_by(LOSS).value == 1.5


def test_a_best_of_an_older_version_is_that_of_its_recipes_metric(tmp_path: Path) -> None:
    state = make_run(tmp_path, [[row(0)]]).state
    saved = state.state_dict(DistributedContext(), num_updates=0)
    saved["best"] = {"value": 1.5, "step": 4, "num_worse": 1, "last_step": 6}
    saved["config"] = {"validation": {"metric": "validation/loss"}}
    reader: Any = SimpleNamespace(state=saved, directory=tmp_path, part=saved.__getitem__)
    state.load(reader, tmp_path)
    assert state.best.measured_by(LOSS).value == 1.5
    assert state.best.measured_by(ACCURACY).value is None


def test_a_change_is_said_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    state = make_run(tmp_path, [[row(0)]]).state
    choose_measure(state, LOSS)
    assert not caplog.messages
    state.best.offer(1.5, 4, lower_is_better=True)
    choose_measure(state, LOSS)
    assert not caplog.messages
    choose_measure(state, ACCURACY)
    (line,) = caplog.messages
    assert line == (
        f"validation is by {ACCURACY} now, best: none yet; the best by {LOSS}, 1.5 at step 4, is kept and not compared"
        " with it"
    )
