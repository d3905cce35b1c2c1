"""The learning rate: a pure function of progress, with the corners where they belong."""

from __future__ import annotations

import math

import pytest

from models.common.errors import InputError
from trainer.config.schema import Duration, Schedule
from trainer.schedule import Consumed, LearningRate


def rate(schedule: Schedule, duration: Duration | None = None, *, epoch_samples: int = 0) -> LearningRate:
    return LearningRate(schedule, duration or Duration.steps(1000), epoch_samples, global_rows=8)


def at(schedule: Schedule, step: int) -> float:
    """The factor after so many of 1,000 steps."""
    return rate(schedule).at(Consumed(steps=step))


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_it_rises_over_the_warmup_and_falls_to_the_floor(kind: str) -> None:
    schedule = Schedule.model_validate({"kind": kind, "warmup": 0.1, "floor": 0.25})
    assert at(schedule, 0) == 0.0
    assert at(schedule, 50) == pytest.approx(0.5)
    assert at(schedule, 100) == pytest.approx(1.0)
    assert at(schedule, 1000) == pytest.approx(1.0 if kind == "constant" else 0.25)
    falling = [at(schedule, 100 + 18 * step) for step in range(51)]
    assert falling == sorted(falling, reverse=True)


def test_cosine_equals_the_formula_of_transformers() -> None:
    """get_cosine_schedule_with_warmup with 100 of 1,000 steps."""
    schedule = Schedule(kind="cosine", warmup=0.1)
    for step in range(100, 1001, 10):
        assert at(schedule, step) == pytest.approx(0.5 * (1.0 + math.cos(math.pi * (step - 100) / 900)))


@pytest.mark.parametrize(
    ("duration", "expected"),
    [(Duration.steps(8), 0.5), (Duration.samples(64), 0.25), (Duration.tokens(320), 0.5), (Duration.epochs(2), 0.1)],
)
def test_progress_is_counted_in_the_durations_unit(duration: Duration, expected: float) -> None:
    learning_rate = rate(Schedule(), duration, epoch_samples=100)
    assert learning_rate.progress(Consumed(steps=4, samples=16, tokens=160, draws=20)) == expected
    assert learning_rate.progress(Consumed(10**6, 10**6, 10**6, 10**6)) == 1.0


def test_a_warmup_in_steps_becomes_a_share() -> None:
    schedule = Schedule(warmup_steps=20)
    assert rate(schedule, Duration.steps(200)).warmup_share == 0.1
    assert rate(schedule, Duration.samples(1600)).warmup_share == 0.1
    assert rate(schedule, Duration.epochs(2), epoch_samples=800).warmup_share == 0.1
    with pytest.raises(InputError, match=r"schedule\.warmup_steps"):
        _ = rate(schedule, Duration.tokens(10)).warmup_share


def test_a_skipped_batch_leaves_the_rate_as_it_was() -> None:
    learning_rate, before = rate(Schedule(warmup=0.1)), Consumed(steps=3, samples=9, draws=12, batches=4)
    assert learning_rate.at(before.skipped(4)) == learning_rate.at(before)
    assert learning_rate.at(before.learnt(samples=4, tokens=9, draws=4)) > learning_rate.at(before)
