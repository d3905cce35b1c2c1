"""Many threads ask one engine: each gets the text of its query asked alone, and nothing stays behind."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from eval.batch import Batch
from eval.engine import (
    Draining,
    Ended,
    Engine,
    EngineDead,
    Failed,
    Piece,
    QueueFull,
)
from eval.engine_loop import CUT_OFF
from eval.kv_cache import DynamicKVCache
from eval.predictor import Decoding, Predictor
from eval.static_cache import StaticKVCache
from eval.waiting import CLOSING
from models.common.errors import InputError
from tests.support.arrivals import alone, mixed
from tests.support.bundles import make_bundle
from tests.support.engines import LIMITS, LONG, Inbox, ask, submit, until
from tests.support.patience import GUARD_S
from tests.support.sweeps import num_cases


def test_callers_at_once_get_what_each_would_get_alone(engine: Engine) -> None:
    asked = mixed()[::4]
    expected = alone(engine.predictor, asked)
    found: dict[int, str] = {}

    def stream(place: int) -> None:
        while place not in found:
            try:
                found[place] = "".join(engine.stream(*asked[place]))
            except QueueFull as refusal:
                time.sleep(refusal.retry_after_s / 20)

    threads = [threading.Thread(target=stream, args=(place,)) for place in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(GUARD_S)
    assert [found[place] for place in range(len(asked))] == expected
    stats = engine.stats()
    assert sum(stats.finished.values()) == stats.finished["stop"] + stats.finished["length"] == len(asked)
    assert stats.rows_per_step > 1.5
    assert 0 < stats.padding_share < 1
    assert stats.features.num_hits > 0


def test_where_rows_can_only_start_together_the_others_wait(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a sliding window, whose keys have no place for padding."""
    monkeypatch.setattr(DynamicKVCache, "can_join", False)
    monkeypatch.setattr(StaticKVCache, "can_join", False)
    asked = mixed()[::12]
    expected = alone(predictor, asked)
    engine = Engine(predictor, LIMITS).start()
    running: list[int] = []
    try:
        join = Batch.join
        monkeypatch.setattr(Batch, "join", lambda batch, rows: (running.append(len(batch.rows)), join(batch, rows))[1])
        inboxes = [submit(engine, decoding, query)[1] for query, decoding in asked]
        assert [inbox.all()[0] for inbox in inboxes] == expected
    finally:
        engine.close()
    assert set(running) == {0}


def test_beams_are_found_between_the_steps_of_others(engine: Engine) -> None:
    beams, plain = Decoding(max_new_tokens=10, num_beams=3), Decoding(max_new_tokens=60)
    expected = engine.predictor.answer([ask()], plain) + engine.predictor.answer([ask()], beams)
    inboxes = [submit(engine, decoding)[1] for decoding in (plain, beams)]
    assert [inbox.all()[0] for inbox in inboxes] == expected


def test_an_answer_says_why_it_ended_and_how_long_it_took(engine: Engine) -> None:
    whole, ended = submit(engine, Decoding(max_new_tokens=20))[1].all()
    assert isinstance(ended, Ended)
    assert (ended.reason, ended.tokens) == ("length", 20)
    assert ended.prompt_tokens == len(engine.prepare(ask(), LONG).ids)
    assert min(ended.queue_s, ended.prefill_s, ended.decode_s) >= 0
    assert ended.prefill_s + ended.decode_s > 0
    text, ended = submit(engine, Decoding(max_new_tokens=20), stop=(whole[5:8],))[1].all()
    assert isinstance(ended, Ended)
    assert ended.reason == "stop"
    assert text == whole[: whole.index(whole[5:8])].rstrip()
    hot = Decoding(max_new_tokens=20, temperature=1.0)
    texts = [submit(engine, hot, seed=seed)[1].all()[0] for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0] == engine.predictor.answer([ask()], replace(hot, seed=3))[0]


def test_requests_that_do_not_fit_wait_in_their_order_and_one_too_many_is_refused(engine: Engine) -> None:
    running = [submit(engine, LONG) for _ in range(LIMITS.rows)]
    until(lambda: engine.stats().running + engine.stats().waiting == 4 and not engine.stats().waiting)
    stats = engine.stats()
    assert 0 < stats.cache_bytes_promised <= stats.cache_bytes_total <= LIMITS.cache_bytes
    waiting = [submit(engine, Decoding(max_new_tokens=3)) for _ in range(LIMITS.waiting)]
    with pytest.raises(QueueFull) as refusal:
        submit(engine, LONG)
    assert 1 <= refusal.value.retry_after_s <= 60
    assert engine.stats().rejected["queue_full"] == 1
    for request, _ in running:
        request.cancel()
    assert all(isinstance(inbox.all()[1], Ended) for _, inbox in waiting)
    admitted_s = [request._admitted_s for request, _ in waiting]
    assert admitted_s == sorted(admitted_s)


def test_keys_and_values_are_promised_ahead(predictor: Predictor) -> None:
    """Rows that together may outgrow the memory do not run together, though they would fit now."""
    engine = Engine(predictor, replace(LIMITS, cache_bytes=2 * 512 * 384)).start()
    try:
        inboxes = [submit(engine, Decoding(max_new_tokens=512))[1] for _ in range(3)]
        while not isinstance(inboxes[2].next(), Piece):
            pass
        stats = engine.stats()
        assert stats.cache_bytes_total == 2 * 512 * 384
        assert stats.running <= 2
        assert sum(stats.finished.values()) >= 1, "the third had to wait for the end of another"
    finally:
        engine.close()


def test_a_chat_that_never_fits_is_wrong_input(predictor: Predictor) -> None:
    engine = Engine(predictor, replace(LIMITS, cache_bytes=30_000)).start()
    try:
        with pytest.raises(InputError, match="memory for keys and values"):
            engine.prepare(ask("one two three " * 20), LONG)
        with pytest.raises(InputError, match="the model reads 512"):
            engine.prepare(ask("one two three " * 200), LONG)
        _, ended = submit(engine, LONG, ask("What?"))[1].all()
        assert isinstance(ended, Ended)
        assert (ended.reason, ended.prompt_tokens + ended.tokens) == ("length", 30_000 // 384)
    finally:
        engine.close()


def test_a_cancelled_row_is_carried_for_at_most_one_step(engine: Engine) -> None:
    other, _ = submit(engine, LONG)
    request, inbox = submit(engine, LONG)
    assert isinstance(inbox.next(), Piece)
    request.cancel()
    num_tokens = request.num_tokens
    _, ended = inbox.all()
    assert isinstance(ended, Ended)
    assert ended.reason == "cancelled"
    assert ended.tokens <= num_tokens + 1
    until(lambda: engine.stats().running == 1)
    other.cancel()
    until(lambda: engine.stats().running == 0)
    assert engine.stats().cancelled == 2


def test_what_is_cancelled_while_it_waits_is_never_read(engine: Engine) -> None:
    running = [submit(engine, LONG)[0] for _ in range(LIMITS.rows)]
    until(lambda: engine.stats().running == LIMITS.rows)
    read = engine.stats().prompt_tokens
    request, inbox = submit(engine, LONG)
    request.cancel()
    text, ended = inbox.all()
    assert (text, ended.reason, ended.tokens) == ("", "cancelled", 0)  # type: ignore[union-attr]
    assert engine.stats().prompt_tokens == read
    for each in running:
        each.cancel()


def test_a_reader_that_goes_away_ends_its_answer(engine: Engine) -> None:
    stream = engine.stream(ask(), LONG)
    next(stream)
    del stream
    until(lambda: engine.stats().cancelled == 1)


def test_a_drain_ends_what_was_taken_and_takes_nothing_new(engine: Engine) -> None:
    inboxes = [submit(engine, Decoding(max_new_tokens=30))[1] for _ in range(6)]
    assert engine.drain(GUARD_S)
    assert engine.state == "draining"
    with pytest.raises(Draining):
        submit(engine, LONG)
    assert all(isinstance(inbox.all()[1], Ended) for inbox in inboxes)


def test_what_a_drain_has_no_time_for_is_told_so(engine: Engine) -> None:
    inboxes = [submit(engine, LONG)[1] for _ in range(6)]
    assert not engine.drain(0.0)
    engine.close()
    for inbox in inboxes:
        _, failed = inbox.all()
        assert isinstance(failed, Failed)
        assert isinstance(failed.error, EngineDead)
        assert failed.retry_after_s is not None
        assert str(failed.error) in (CUT_OFF, CLOSING)
    assert engine.state == "dead"
    with pytest.raises(EngineDead, match=CLOSING):
        submit(engine, LONG)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_recorded_steps_of_many_rows_write_what_each_gets_alone(tmp_path: Path) -> None:
    recorded = Predictor.open(make_bundle(tmp_path / "bundle"), device="cuda")
    plain = Predictor(recorded.model, recorded.processor, device="cuda")
    asked = mixed()[::2]
    expected = alone(plain, asked)
    engine = Engine(recorded, replace(LIMITS, waiting=len(asked))).start()
    try:
        inboxes = [submit(engine, decoding, query)[1] for query, decoding in asked]
        assert [inbox.all()[0] for inbox in inboxes] == expected
        cache = engine._loop.batch.cache  # type: ignore[union-attr]
        assert {size for size, _ in cache._graphs} == {1, 2, 4}  # type: ignore[attr-defined]
    finally:
        engine.close()


@pytest.mark.slow
@pytest.mark.fuzz
def test_random_requests_leave_nothing_behind(predictor: Predictor) -> None:
    num_lists = num_cases(10, 50)
    hypothesis = pytest.importorskip("hypothesis")
    from hypothesis import strategies

    engine = Engine(predictor, replace(LIMITS, waiting=64, feature_bytes=1 << 14, chat_bytes=1 << 17)).start()
    prompts = [engine.prepare(query, LONG) for query, _ in mixed()[::6]]
    request = strategies.tuples(
        strategies.integers(0, len(prompts) - 1),
        strategies.sampled_from((1, 2, 5, 20, 400)),
        strategies.sampled_from((0.0, 1.0)),
        strategies.one_of(strategies.none(), strategies.integers(0, 4)),
    )

    @hypothesis.settings(max_examples=num_lists, deadline=None, derandomize=True)
    @hypothesis.given(strategies.lists(request, min_size=20, max_size=20))
    def check(requests: list[tuple[int, int, float, int | None]]) -> None:
        inboxes = []
        for place, num_tokens, temperature, patience in requests:
            decoding, inbox = Decoding(max_new_tokens=num_tokens, temperature=temperature), Inbox()
            asked = engine.submit(prompts[place], decoding, inbox.put)
            inboxes.append((asked, inbox, patience))
        for asked, inbox, patience in inboxes:
            for _ in range(patience or 0):
                if not isinstance(inbox.next(), Piece):
                    break
            else:
                if patience is not None:
                    asked.cancel()
                    inbox.all()
        for asked, _, _ in inboxes:
            asked.cancel()
        until(lambda: engine.stats().running == engine.stats().waiting == 0)
        stats = engine.stats()
        assert stats.cache_bytes_promised == 0
        assert stats.kept_bytes <= (1 << 14) + (1 << 17)
        assert stats.finished["failed"] == 0

    try:
        check()
        stats = engine.stats()
        assert sum(stats.finished.values()) >= 20 * num_lists
        assert stats.cancelled > 2 * num_lists
    finally:
        engine.close()
    assert engine.stats().kept_bytes == 0
    assert all(thread.name != "engine" for thread in threading.enumerate())
