"""An answer is given again to the same query alone: the same tokens, pixels and decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from eval.answers import AnswerCache
from eval.decoding import Decoding
from eval.pixels import Pixels
from eval.prompts import Prompt

GREEDY = Decoding()
PIXELS = torch.arange(6.0).view(1, 2, 3)


def prompt(*ids: int, **pixels: torch.Tensor) -> Prompt:
    return Prompt(list(ids), Pixels(pixels))


@pytest.mark.parametrize(
    ("other", "decoding"),
    [
        (prompt(1, 3, pixel_values=PIXELS), GREEDY),
        (prompt(1, 2, pixel_values=PIXELS + 1), GREEDY),
        (prompt(1, 2, pixel_values=PIXELS.view(1, 3, 2)), GREEDY),
        (prompt(1, 2, pixel_values=PIXELS.half()), GREEDY),
        (prompt(1, 2, image_sizes=PIXELS), GREEDY),
        (prompt(1, 2), GREEDY),
        (prompt(1, 2, pixel_values=PIXELS), Decoding(seed=1, temperature=0.5)),
        (prompt(1, 2, pixel_values=PIXELS), Decoding(stop=("x",))),
    ],
)
def test_what_differs_in_anything_is_another_query(other: Prompt, decoding: Decoding) -> None:
    cache: AnswerCache[str] = AnswerCache(4)
    cache.keep(prompt(1, 2, pixel_values=PIXELS), GREEDY, "seen")
    assert cache.find(prompt(1, 2, pixel_values=PIXELS.clone()), GREEDY) == "seen"
    assert cache.find(other, decoding) is None
    assert cache.find(prompt(1, 2, pixel_values=PIXELS), Decoding(seed=7)) == "seen", "greedy needs no seed"


def test_the_answer_not_asked_for_longest_goes() -> None:
    cache: AnswerCache[str] = AnswerCache(2)
    for number in (1, 2):
        cache.keep(prompt(number), GREEDY, str(number))
    assert cache.find(prompt(1), GREEDY) == "1"
    cache.keep(prompt(3), GREEDY, "3")
    found: list[Any] = [cache.find(prompt(number), GREEDY) for number in (1, 2, 3)]
    assert found == ["1", None, "3"]


def test_a_cache_of_none_keeps_none() -> None:
    cache: AnswerCache[str] = AnswerCache(0)
    cache.keep(prompt(1), GREEDY, "1")
    assert cache.find(prompt(1), GREEDY) is None
