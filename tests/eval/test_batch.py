"""Rows that join, step and leave: each has the text of its query asked alone, in both kinds of cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from eval.batch import Batch, Row
from eval.predictor import Decoding, Predictor, Query, Turn
from models.common.errors import run_cli
from tests.support.arrivals import CACHES, alone, answer_in_company, make_cache, mixed
from tests.support.bundles import image, make_bundle
from tests.support.sweeps import num_cases
from tools.export.quantize import main as quantize


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    return Predictor.open(make_bundle(tmp_path_factory.mktemp("bundle")), device="cpu")


@pytest.fixture(params=CACHES)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def ask(text: str, *kinds: str) -> Query:
    return Query(tuple(image(kind) for kind in kinds), (Turn("user", text),))


def make_rows(predictor: Predictor, *texts: str, num_tokens: int = 20) -> list[Row]:
    decoding = Decoding(max_new_tokens=num_tokens)
    return [predictor.row(predictor.prompt(ask(text, "circle")), decoding) for text in texts]


def make_batch(predictor: Predictor, kind: str, kept_bytes: int = 0) -> Batch:
    return Batch(predictor.make_reader(kept_bytes, kept_bytes), make_cache(predictor, kind))


def test_text_is_that_of_the_query_alone(predictor: Predictor, kind: str) -> None:
    asked = mixed()[::3]
    expected = alone(predictor, asked)
    assert len(set(expected)) > len(asked) // 2, "answers must differ for the test to mean anything"
    for seed in (0, 1):
        assert answer_in_company(predictor, asked, kind, seed) == expected


@pytest.fixture(scope="module", params=["fp32", "nf4"])
def answered(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Predictor, list[str]]:
    """A model in one form, and its answers to `mixed()`, each by itself."""
    folder, form = tmp_path_factory.mktemp("arrivals"), str(request.param)
    bundle = make_bundle(folder / "bundle")
    if form == "nf4":
        words = [str(bundle), str(folder / form), "--to", form, "--probes", "2", "--force"]
        assert run_cli(quantize, words) == 0
        bundle = folder / form
    predictor = Predictor.open(bundle, device="cpu")
    return predictor, alone(predictor, mixed())


@pytest.mark.slow
@pytest.mark.fuzz
def test_text_is_that_of_the_query_alone_in_random_arrivals(answered: tuple[Predictor, list[str]], kind: str) -> None:
    predictor, expected = answered
    for seed in range(num_cases(4, 20)):
        assert answer_in_company(predictor, mixed(), kind, seed) == expected


def run(batch: Batch, found: dict[Row, str]) -> dict[Row, str]:
    """Step until the last row has left."""
    batch.leave()
    while batch.rows:
        for row, text in batch.step():
            found[row] += text
        batch.leave()
    return found


def test_a_row_leaves_and_the_others_do_not_notice(predictor: Predictor, kind: str) -> None:
    texts = ["What?", "How many shapes are there in the image?", "How many?"]
    expected = predictor.answer([ask(text, "circle") for text in texts], Decoding(max_new_tokens=20))
    rows, batch = make_rows(predictor, *texts), make_batch(predictor, kind)
    found = dict(batch.join(rows))
    for row, text in batch.step():
        found[row] += text
    rows[0].cancel.set()
    assert batch.leave() == rows[:1]
    assert set(batch.rows) == set(rows[1:])
    run(batch, found)
    assert expected[0].startswith(found[rows[0]])
    assert found[rows[0]] != expected[0]
    assert [found[row] for row in rows[1:]] == expected[1:]
    assert batch.rows == []
    assert batch.needs() == 0


def test_positions_are_counted_with_their_padding(predictor: Predictor, kind: str) -> None:
    rows, batch = make_rows(predictor, "What?", "Which colour is it? " * 5), make_batch(predictor, kind)
    found = dict(batch.join(rows))
    longest = max(row.need for row in rows)
    assert batch.needs() == 2 * (longest if kind == "growing" else 256)
    run(batch, found)
    counts = batch.counts
    assert counts.rows == sum(len(row.text.ids) - 1 for row in rows)
    assert 0 < counts.tokens < counts.columns
    if kind == "growing":
        shorter = min(len(row.prompt.ids) for row in rows)
        assert 1 - counts.tokens / counts.columns < 1 - shorter / longest


def test_when_the_longest_row_leaves_its_padding_goes(predictor: Predictor) -> None:
    short, long = make_rows(predictor, "What?", "Which colour is it? " * 9)
    cache = make_cache(predictor, "growing")
    batch = Batch(predictor.make_reader(0, 0), cache)
    batch.join([short, long])
    long.cancel.set()
    batch.leave()
    batch.step()
    assert cache.num_columns == len(short.prompt.ids) + 1


def test_a_failed_step_can_be_taken_again(predictor: Predictor, kind: str) -> None:
    """As after memory ran out in the last layer: the layers before it have read the token already."""
    expected = predictor.answer([ask("What?", "circle"), ask("How many?", "circle")], Decoding(max_new_tokens=20))
    rows, batch = make_rows(predictor, "What?", "How many?"), make_batch(predictor, kind)
    found = dict(batch.join(rows))

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("planned")

    last = predictor.model.model.language_model.layers[-1].mlp
    for _ in range(2):
        hook = last.register_forward_pre_hook(fail)
        with pytest.raises(torch.OutOfMemoryError):
            batch.step()
        hook.remove()
        for row, text in batch.step():
            found[row] += text
    run(batch, found)
    assert [found[row] for row in rows] == expected


def test_a_failed_join_leaves_the_running_rows_as_they_were(predictor: Predictor, kind: str) -> None:
    (expected,) = predictor.answer([ask("What?", "circle")], Decoding(max_new_tokens=20))
    rows, batch = make_rows(predictor, "What?", "How many?"), make_batch(predictor, kind)
    found = dict(batch.join(rows[:1]))
    hook = predictor.model.model.vision_tower.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        batch.join(rows[1:])
    hook.remove()
    assert run(batch, found) == {rows[0]: expected}


def test_what_a_row_leaves_behind_need_not_be_finite(predictor: Predictor) -> None:
    """A slot whose last row overflowed serves the next one as a new slot does."""
    (expected,) = predictor.answer([ask("What?", "circle")], Decoding(max_new_tokens=20))
    cache = make_cache(predictor, "fixed", num_rows=2)
    batch = Batch(predictor.make_reader(0, 0), cache)
    first, second = make_rows(predictor, "How many are there?" * 9, "What?")
    batch.join([first])
    for slots in cache._layers:  # type: ignore[attr-defined]
        for flat in slots._flat:
            flat.fill_(float("nan"))
    first.cancel.set()
    batch.leave()
    assert run(batch, dict(batch.join([second]))) == {second: expected}


def test_a_chats_next_turn_is_read_alone_beside_rows_that_are_new(predictor: Predictor, kind: str) -> None:
    """Newcomers that begin differently are read together: a kept chat, and prompts of which nothing is known."""
    turns = (Turn("user", "What is in the image?"),)
    answer = predictor.answer([Query((image(),), turns)], Decoding(max_new_tokens=20))[0]
    chat = Query((image(),), (*turns, Turn("assistant", answer), Turn("user", "Which colour?")))
    queries = [ask("How many shapes are there in it?", "square"), chat, ask("no image")]
    expected = predictor.answer(queries, Decoding(max_new_tokens=20))
    batch = make_batch(predictor, kind, kept_bytes=1 << 20)
    run(batch, dict(batch.join(make_rows(predictor, "What is in the image?"))))
    rows = [predictor.row(predictor.prompt(query), Decoding(max_new_tokens=20)) for query in queries]
    found = dict(batch.join(rows))
    chats = batch._reader.chats
    assert chats is not None
    assert (chats.num_queries, chats.num_hits) == (4, 1)
    run(batch, found)
    assert [found[row] for row in rows] == expected
