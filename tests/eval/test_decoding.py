"""The choice of a token, and the text of an answer while its tokens come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from eval.decoding import AnswerStream, AnswerText, Decoding, choose_tokens
from models.common.errors import InputError

END = 9
PIECES = {0: b"He", 1: b"llo", 2: b" wor", 3: b"ld", 4: b"\xc3", 5: b"\xa9", 6: b"ST", 7: b"OP", 8: b"  ", END: b""}


class Bytes:
    """A tokenizer whose tokens are bytes; some are half a character."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return b"".join(PIECES[each] for each in ids).decode(errors="replace")


def text(*, max_tokens: int = 50, stop: tuple[str, ...] = ()) -> AnswerText:
    return AnswerText(Bytes(), end_ids=frozenset({END}), max_tokens=max_tokens, stop=stop)


def push(answer: AnswerText, *ids: int) -> list[str]:
    return [answer.push(each) for each in ids]


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"num_beams": 0}, "num_beams is 0"),
        ({"num_beams": 2, "temperature": 1.0}, "beams do not sample"),
        ({"stop": ("",)}, "a stop string is empty"),
    ],
)
def test_values_that_mean_nothing_are_refused(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        Decoding(**wrong)


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_greedy_is_the_largest() -> None:
    logits_BV = torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    assert choose_tokens(logits_BV, [Decoding()] * 2, generators([0, 0])).tolist() == [1, 0]


def test_a_row_is_drawn_alike_alone_and_beside_rows_of_other_decodings() -> None:
    asked = [
        Decoding(temperature=1.0, seed=3),
        Decoding(),
        Decoding(temperature=0.7, top_p=0.8, seed=3),
        Decoding(temperature=1.5, top_p=0.3),
    ]
    seeds = [each.seed for each in asked]
    together, alone = generators(seeds), generators(seeds)
    for number in range(20):
        logits_BV = torch.randn(4, 500, generator=torch.Generator().manual_seed(number))
        drawn = choose_tokens(logits_BV, asked, together).tolist()
        assert drawn[1] == int(logits_BV[1].argmax())
        rows = zip(logits_BV, asked, alone, strict=True)
        assert drawn == [int(choose_tokens(row[None], [decoding], [own])) for row, decoding, own in rows]


def test_a_nucleus_is_the_smallest_set_that_reaches_top_p() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    decoding = Decoding(temperature=1.0, top_p=0.7)
    drawn = choose_tokens(probabilities.log().expand(400, -1), [decoding] * 400, generators(range(400)))
    assert set(drawn.tolist()) == {0, 1}
    assert 0.55 < (drawn == 0).float().mean() < 0.7  # 0.5 / 0.8; 3 deviations are 0.07


def test_half_a_character_is_held_back() -> None:
    assert push(text(), 0, 4, 5, END) == ["He", "", "\xe9", ""]


def test_white_space_around_an_answer_is_cut() -> None:
    assert push(text(), 8, 0, 8, 1, 8, END) == ["", "He", "", "  llo", "", ""]


def test_a_stop_string_is_cut_wherever_its_tokens_begin() -> None:
    answer = text(stop=("STOP",))
    assert push(answer, 0, 6, 7, 1) == ["He", "", "", ""]
    assert answer.done
    assert answer.reason == "stop"
    assert push(text(stop=("STOP",)), 0, 6, 1) == ["He", "", "STllo"], "it was none after all"


def test_an_answer_ends_after_so_many_tokens_with_what_was_held_back() -> None:
    answer = text(max_tokens=2, stop=("STOP",))
    assert push(answer, 0, 6, 7) == ["He", "ST", ""]
    assert answer.ids == [0, 6]
    assert answer.reason == "length"


def test_an_answer_that_is_broken_off_gives_what_was_held_back() -> None:
    answer = text(stop=("STOP",))
    push(answer, 0, 6)
    assert answer.finish() == "ST"
    assert answer.finish() == ""
    assert answer.reason == "cancelled"


def test_a_stream_leaves_empty_pieces_out() -> None:
    answer = text()
    stream = AnswerStream((answer.push(each) for each in (0, 4, 5, 2, END)), lambda: len(answer.ids))
    assert list(stream) == ["He", "\xe9", " wor"]
    assert stream.num_tokens == 5
    assert stream.first_token_s is not None
