"""What goes wrong while an engine answers costs the rows that it concerns, and those who wait are told."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from eval.engine import Engine, EngineDead, Event, Failed, Piece
from eval.predictor import Decoding
from tests.support.engines import LONG, Faults, Inbox, ask, submit, until


def test_a_callers_own_error_costs_its_own_answer(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    def broken(event: Event) -> None:
        raise ValueError("not my day")

    _, inbox = submit(engine, Decoding(max_new_tokens=30))
    engine.submit(engine.prepare(ask(), LONG), LONG, broken)
    assert inbox.all()[0] == engine.predictor.answer([ask()], Decoding(max_new_tokens=30))[0]
    until(lambda: engine.stats().cancelled == 1)
    assert "not my day" in caplog.text
    assert engine.state == "serving"


def test_without_memory_for_newcomers_the_running_rows_go_on(engine: Engine) -> None:
    decoding = Decoding(max_new_tokens=60)
    expected = engine.predictor.answer([ask()], decoding)[0]
    with Faults(engine.predictor, torch.OutOfMemoryError("planned"), 1, steps=False) as faults:
        _, running = submit(engine, decoding)
        first = running.next()
        assert isinstance(first, Piece)
        faults.begin()
        _, failed = submit(engine, decoding)[1].all()
        assert isinstance(failed, Failed)
        assert failed.retry_after_s is not None
        assert first.text + running.all()[0] == expected
        assert submit(engine, decoding)[1].all()[0] == expected


def test_without_memory_in_a_step_the_newest_row_fails_alone(engine: Engine) -> None:
    decoding = Decoding(max_new_tokens=200)
    expected = engine.predictor.answer([ask()], decoding)[0]
    with Faults(engine.predictor, torch.OutOfMemoryError("planned"), 1, steps=True) as faults:
        _, older = submit(engine, decoding)
        first = older.next()
        assert isinstance(first, Piece)
        _, newer = submit(engine, decoding)
        assert isinstance(newer.next(), Piece)
        faults.begin()
        _, failed = newer.all()
        assert isinstance(failed, Failed)
        assert failed.retry_after_s is not None
        assert first.text + older.all()[0] == expected


def test_another_error_in_a_step_fails_the_running_rows_and_the_engine_goes_on(engine: Engine) -> None:
    with Faults(engine.predictor, RuntimeError("planned"), 1, steps=True) as faults:
        inboxes = [submit(engine, LONG)[1] for _ in range(2)]
        until(lambda: engine.stats().running == 2)
        faults.begin()
        for inbox in inboxes:
            _, failed = inbox.all()
            assert isinstance(failed, Failed)
            assert (str(failed.error), failed.retry_after_s) == ("planned", None)
        expected = engine.predictor.answer([ask()], Decoding(max_new_tokens=9))[0]
        assert submit(engine, Decoding(max_new_tokens=9))[1].all()[0] == expected
    assert engine.state == "serving"


def test_three_failed_steps_in_a_row_are_the_end(engine: Engine) -> None:
    with Faults(engine.predictor, RuntimeError("planned"), 3, steps=True) as faults:
        faults.begin()
        for _ in range(3):
            assert isinstance(submit(engine, LONG)[1].all()[1], Failed)
        until(lambda: engine.state == "dead")
        with pytest.raises(EngineDead, match="the server's log says more"):
            submit(engine, LONG)


def test_a_prompt_that_cannot_be_read_is_its_own_fault(engine: Engine) -> None:
    prompt = engine.prepare(ask(), LONG)
    wrong = replace(prompt, ids=[token for token in prompt.ids if token != prompt.ids[10]])
    for _ in range(4):
        inbox = Inbox()
        engine.submit(wrong, LONG, inbox.put)
        assert isinstance(inbox.all()[1], Failed)
    assert engine.state == "serving"
