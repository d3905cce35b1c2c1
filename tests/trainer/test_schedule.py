"""The learning rate: a pure function of progress, with the corners where they belong."""

from __future__ import annotations

import math

import pytest

from models.errors import InputError
from trainer.config import Duration, Schedule
from trainer.schedule import Consumed, multiplier, progress, warmup_share


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_it_rises_over_the_warmup_and_falls_to_the_floor(kind: str) -> None:
    schedule = Schedule.model_validate({"kind": kind, "warmup": 0.1, "floor": 0.25})
    assert multiplier(schedule, 0.1, 0.0) == 0.0
    assert multiplier(schedule, 0.1, 0.05) == pytest.approx(0.5)
    assert multiplier(schedule, 0.1, 0.1) == pytest.approx(1.0)
    assert multiplier(schedule, 0.1, 1.0) == pytest.approx(1.0 if kind == "constant" else 0.25)
    falling = [multiplier(schedule, 0.1, 0.1 + 0.9 * step / 50) for step in range(51)]
    assert falling == sorted(falling, reverse=True)


def test_cosine_equals_the_formula_of_transformers() -> None:
    """get_cosine_schedule_with_warmup with 10 of 100 steps."""
    schedule = Schedule(kind="cosine", warmup=0.1)
    for step in range(10, 101):
        expected = 0.5 * (1.0 + math.cos(math.pi * (step - 10) / 90))
        assert multiplier(schedule, 0.1, step / 100) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("duration", "expected"),
    [(Duration.steps(8), 0.5), (Duration.samples(64), 0.25), (Duration.tokens(320), 0.5), (Duration.epochs(2), 0.1)],
)
def test_progress_is_counted_in_the_durations_unit(duration: Duration, expected: float) -> None:
    consumed = Consumed(steps=4, samples=16, tokens=160, draws=20)
    assert progress(duration, consumed, epoch_samples=100) == expected
    assert progress(duration, Consumed(10**6, 10**6, 10**6, 10**6), epoch_samples=100) == 1.0


def test_a_warmup_in_steps_becomes_a_share() -> None:
    schedule = Schedule(warmup_steps=20)
    assert warmup_share(schedule, Duration.steps(200), epoch_samples=0, rows=8) == 0.1
    assert warmup_share(schedule, Duration.samples(1600), epoch_samples=0, rows=8) == 0.1
    assert warmup_share(schedule, Duration.epochs(2), epoch_samples=800, rows=8) == 0.1
    with pytest.raises(InputError, match=r"schedule\.warmup_steps"):
        warmup_share(schedule, Duration.tokens(10), epoch_samples=0, rows=8)
