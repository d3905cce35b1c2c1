"""Further turns of a chat: what is reused changes nothing but the work."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from eval.predictor import Decoding, Predictor, Query, Turn
from tests.support.bundles import make_bundle, picture

SHORT = Decoding(max_new_tokens=16)


@pytest.fixture
def predictor(tmp_path: Path) -> Predictor:
    return Predictor.open(make_bundle(tmp_path / "bundle"), device="cpu")


class Work:
    """Counts what a model reads: pictures through the vision tower, positions through the language model."""

    def __init__(self, predictor: Predictor) -> None:
        self.num_pictures = self.num_positions = 0
        inner = predictor.model.model
        inner.vision_tower.register_forward_pre_hook(self._see, with_kwargs=True)
        inner.language_model.register_forward_pre_hook(self._read, with_kwargs=True)

    def _see(self, _: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        self.num_pictures += len(positional[0] if positional else named["pixel_values"])

    def _read(self, _: Any, __: Any, named: dict[str, Any]) -> None:
        self.num_positions += named["inputs_embeds"].shape[1]


def talk(predictor: Predictor, questions: list[str], kind: str = "circle") -> list[str]:
    """Ask one after another, each with the chat before it."""
    turns: tuple[Turn, ...] = ()
    answers = []
    for question in questions:
        turns = (*turns, Turn("user", question))
        answers.append("".join(predictor.stream(Query((picture(kind),), turns), SHORT)))
        turns = (*turns, Turn("assistant", answers[-1]))
    return answers


def test_a_further_turn_reads_only_what_is_new_and_answers_the_same(predictor: Predictor) -> None:
    questions = ["What is in the picture?", "Which colour?", "How many are there?"]
    forgetful = Predictor(predictor.model, predictor.processor, device="cpu")
    expected = talk(forgetful, questions)
    work = Work(predictor)
    assert talk(forgetful, questions) == expected
    without, work.num_positions, num_pictures = work.num_positions, 0, work.num_pictures
    work.num_pictures = 0
    assert talk(predictor, questions) == expected
    assert (num_pictures, work.num_pictures) == (3, 1)
    assert work.num_positions < without * 0.7


def test_the_same_question_again_reads_one_position(predictor: Predictor) -> None:
    work = Work(predictor)
    first = talk(predictor, ["What is in the picture?"])
    read = work.num_positions
    assert talk(predictor, ["What is in the picture?"]) == first
    assert work.num_positions - read <= SHORT.max_new_tokens
    assert work.num_pictures == 1


def test_another_picture_is_never_answered_from_the_first(predictor: Predictor) -> None:
    forgetful = Predictor(predictor.model, predictor.processor, device="cpu")
    expected = talk(forgetful, ["What?", "And?"], "square")
    talk(predictor, ["What?", "And?"], "circle")
    assert talk(predictor, ["What?", "And?"], "square") == expected


def test_a_chat_that_was_broken_off_goes_on_right(predictor: Predictor) -> None:
    forgetful = Predictor(predictor.model, predictor.processor, device="cpu")
    expected = talk(forgetful, ["What is it?", "Which colour?"])
    cancel = threading.Event()
    stream = predictor.stream(Query((picture(),), (Turn("user", "What is it?"),)), SHORT, cancel=cancel)
    next(stream)
    cancel.set()
    list(stream)
    abandoned = predictor.stream(Query((picture(),), (Turn("user", "What is it?"),)), SHORT)
    next(abandoned)
    del abandoned
    assert talk(predictor, ["What is it?", "Which colour?"]) == expected


def test_an_error_in_the_middle_leaves_no_torn_cache(predictor: Predictor) -> None:
    forgetful = Predictor(predictor.model, predictor.processor, device="cpu")
    expected = talk(forgetful, ["What is it?", "Which colour?"])
    last_layer = predictor.model.model.language_model.layers[-1]
    calls: list[int] = []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("out of luck")

    hook = last_layer.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of luck"):
        talk(predictor, ["What is it?"])
    hook.remove()
    assert talk(predictor, ["What is it?", "Which colour?"]) == expected


def test_two_chats_take_turns_without_forgetting_and_a_third_pushes_out_the_oldest(predictor: Predictor) -> None:
    work = Work(predictor)
    chats = {kind: (Turn("user", f"What is this {kind}?"),) for kind in ("circle", "square")}
    for _ in range(2):
        for kind, turns in chats.items():
            answer = "".join(predictor.stream(Query((picture(kind),), turns), SHORT))
            chats[kind] = (*turns, Turn("assistant", answer), Turn("user", "More?"))
    assert work.num_pictures == 2
    talk(predictor, ["A third"], "circle")
    assert len(predictor._memory._chats) == 2  # type: ignore[union-attr]


def test_chats_without_pictures_do_not_take_each_others(predictor: Predictor) -> None:
    list(predictor.stream(Query((), (Turn("user", "A rather long question about nothing at all?"),)), SHORT))
    list(predictor.stream(Query((), (Turn("user", "Something else, and of some length, too."),)), SHORT))
    assert len(predictor._memory._chats) == 2  # type: ignore[union-attr]
