"""One engine over every published family: callers at once, chats that go on, both kinds of cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from eval.engine import Engine
from eval.predictor import Decoding, Predictor, Query, Turn
from tests.support.arrivals import CACHES, Asked, alone, mixed
from tests.support.bundles import image
from tests.support.engines import LIMITS, submit
from tests.support.published import FAMILIES, SIZES, make_published

FIRST, NEXT = Turn("user", "What is it?"), Turn("user", "And which colour?")


def chats(predictor: Predictor, decoding: Decoding) -> Asked:
    """First turns about images of several proportions, and the turns that follow their answers."""
    firsts = [Query((image("circle", size),), (FIRST,)) for size in SIZES]
    answers = predictor.answer(firsts, decoding)
    turns = [(FIRST, Turn("assistant", answer), NEXT) for answer in answers]
    return [
        (query, decoding)
        for query in (*firsts, *(Query(each.images, more) for each, more in zip(firsts, turns, strict=True)))
    ]


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_callers_at_once_get_what_each_would_get_alone(tmp_path: Path, family: str, kind: str) -> None:
    opened = Predictor.open(make_published(tmp_path / family, family), device="cpu")
    predictor = Predictor(opened.model, opened.processor, device="cpu", is_fixed=kind == "fixed")
    asked = mixed(SIZES[:3])[::7] + chats(predictor, Decoding(max_new_tokens=12))
    expected = alone(predictor, asked)
    assert len(set(expected)) > len(asked) // 2, "answers must differ for the test to mean anything"
    engine = Engine(predictor, replace(LIMITS, waiting=len(asked))).start()
    try:
        for order in (range(len(asked)), reversed(range(len(asked)))):
            places = list(order)
            inboxes = [submit(engine, asked[place][1], asked[place][0])[1] for place in places]
            found = dict(zip(places, (inbox.all()[0] for inbox in inboxes), strict=True))
            assert [found[place] for place in sorted(places)] == expected
        stats = engine.stats()
    finally:
        engine.close()
    assert stats.rows_per_step > 1.5
    assert stats.chats.num_hits > 0, "chats must have gone on from what is kept"
