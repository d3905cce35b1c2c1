"""What the guard decides: robust statistics that one number cannot poison, and counters that end."""

from __future__ import annotations

import math

import pytest

from models.common.errors import InputError
from trainer.config.schema import GuardConfig, SpikeGuard
from trainer.guard import Guard

CONFIG = GuardConfig(max_skips=3, spike=SpikeGuard(window=16))


def settled(losses: int = 16) -> Guard:
    """After so many losses around 2, which differ by 0.1."""
    guard = Guard(CONFIG)
    for number in range(losses):
        assert guard.decide(2.0 + 0.05 * (-1) ** number, 1.0, can_go_back=True).action == "step"
    return guard


@pytest.mark.parametrize(
    ("loss", "norm", "action"),
    [(2.1, 1.0, "step"), (2.9, 1.0, "step"), (3.5, 1.0, "roll back"), (math.nan, 1.0, "skip"),
     (math.inf, math.inf, "skip"), (2.0, math.inf, "skip"), (2.0, math.nan, "skip"), (0.0, 1.0, "step")],
)  # fmt: skip
def test_a_step_is_judged_by_loss_and_norm(loss: float, norm: float, action: str) -> None:
    assert settled().decide(loss, norm, can_go_back=True).action == action


def test_numbers_that_are_not_finite_never_enter_the_statistics() -> None:
    guard = settled()
    for _ in range(2):
        guard.decide(math.nan, 1.0, can_go_back=True)
        guard.decide(math.inf, math.inf, can_go_back=True)
        assert guard.decide(2.0, 1.0, can_go_back=True).action == "step"  # and it is no third skip in a row
    decision = guard.decide(9.0, 1.0, can_go_back=True)
    assert decision.action == "roll back"
    assert "leapt to 9.0000" in decision.reason
    assert "median 2.0" in decision.reason


def test_a_young_run_has_no_spikes_and_one_without_a_checkpoint_skips() -> None:
    assert settled(losses=7).decide(50.0, 1.0, can_go_back=True).action == "step"
    assert settled(losses=8).decide(50.0, 1.0, can_go_back=False).action == "skip"


def test_skips_in_a_row_end() -> None:
    decisions = [guard.decide(math.nan, 1.0, can_go_back=True).action for guard in [settled()] for _ in range(3)]
    assert decisions == ["skip", "skip", "roll back"]
    guard = settled()
    for _ in range(2):
        guard.decide(math.nan, 1.0, can_go_back=False)
    with pytest.raises(InputError, match="3 steps in a row could not be taken; the last: the loss is not finite"):
        guard.decide(math.nan, 1.0, can_go_back=False)


def test_its_memory_goes_through_a_checkpoint() -> None:
    guard, again = settled(), Guard(CONFIG)
    guard.decide(math.nan, 1.0, can_go_back=True)
    again.load_state_dict(guard.state_dict())
    for loss in (2.0, 3.5, math.nan, math.nan, math.nan):
        left, right = (each.decide(loss, 1.0, can_go_back=True) for each in (guard, again))
        assert left == right
    with pytest.raises(InputError, match="version 9"):
        again.load_state_dict({**guard.state_dict(), "version": 9})
