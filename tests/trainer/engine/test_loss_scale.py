"""Dynamic loss scaling: when it moves, between which limits, and what a resumed run takes over."""

from __future__ import annotations

import pytest

from trainer.engine.loss_scale import GROWTH_INTERVAL, INITIAL, LARGEST, LossScale


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_only_fp16_is_scaled(precision: str) -> None:
    scale = LossScale(precision)
    for _ in range(2 * GROWTH_INTERVAL):
        scale.count_step()
    assert scale.value == 1.0
    assert not scale.halve()


def test_an_overflow_halves_down_to_one_and_no_further() -> None:
    scale = LossScale("fp16")
    halvings = 0
    while scale.halve():
        halvings += 1
        assert scale.value == INITIAL / 2**halvings
    assert (halvings, scale.value) == (16, 1.0)


def test_it_doubles_after_a_quiet_time_up_to_its_limit() -> None:
    scale = LossScale("fp16")
    for _ in range(GROWTH_INTERVAL - 1):
        scale.count_step()
    scale.halve()  # the quiet time begins anew
    for _ in range(GROWTH_INTERVAL - 1):
        scale.count_step()
    assert scale.value == INITIAL / 2
    scale.count_step()
    assert scale.value == INITIAL
    for _ in range(20 * GROWTH_INTERVAL):
        scale.count_step()
    assert scale.value == LARGEST


def test_a_resumed_run_goes_on_as_the_uninterrupted_one() -> None:
    whole, resumed = LossScale("fp16"), LossScale("fp16")
    whole.halve()
    for _ in range(GROWTH_INTERVAL - 5):
        whole.count_step()
    resumed.load_state_dict(whole.state_dict())
    for _ in range(5):
        whole.count_step()
        resumed.count_step()
        assert resumed.state_dict() == whole.state_dict()
    assert resumed.value == INITIAL


def test_a_run_that_changes_its_precision_keeps_the_new_ones_scale() -> None:
    fp16, bf16 = LossScale("fp16"), LossScale("bf16")
    before = fp16.state_dict()
    fp16.load_state_dict(bf16.state_dict())
    bf16.load_state_dict(before)
    assert (fp16.value, bf16.value) == (INITIAL, 1.0)
