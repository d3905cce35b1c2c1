"""Further turns of a chat: what is reused changes nothing but the work."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from eval.kv_cache import is_fixable
from eval.predictor import Decoding, Predictor, Query, Turn
from tests.support.bundles import image, make_bundle

SHORT = Decoding(max_new_tokens=16)


@pytest.fixture(params=["growing", "fixed"])
def predictor(request: pytest.FixtureRequest, tmp_path: Path) -> Predictor:
    """Keys and values that grow, and those of fixed size that a GPU has, whose step is run here without its graph."""
    opened = Predictor.open(make_bundle(tmp_path / "bundle"), device="cpu")
    if request.param == "growing":
        return opened
    assert is_fixable(opened.model)
    return Predictor(opened.model, opened.processor, device="cpu", kept_bytes=1 << 24, is_fixed=True)


class Work:
    """Counts what a model reads: images through the vision tower, positions through the language model."""

    def __init__(self, predictor: Predictor) -> None:
        self.num_images = self.num_positions = 0
        inner = predictor.model.model
        inner.vision_tower.register_forward_pre_hook(self._see, with_kwargs=True)
        inner.language_model.register_forward_pre_hook(self._read, with_kwargs=True)

    def _see(self, _: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        self.num_images += len(positional[0] if positional else named["pixel_values"])

    def _read(self, _: Any, __: Any, named: dict[str, Any]) -> None:
        self.num_positions += named["inputs_embeds"].shape[1]


def talk(predictor: Predictor, questions: list[str], kind: str = "circle") -> list[str]:
    """Ask one after another, each with the chat before it."""
    turns: tuple[Turn, ...] = ()
    answers = []
    for question in questions:
        turns = (*turns, Turn("user", question))
        answers.append("".join(predictor.stream(Query((image(kind),), turns), SHORT)))
        turns = (*turns, Turn("assistant", answers[-1]))
    return answers


def test_a_further_turn_reads_only_what_is_new_and_answers_the_same(predictor: Predictor) -> None:
    questions = ["What is in the image?", "Which colour?", "How many are there?"]
    forgetful = Predictor(predictor.model, predictor.processor, device="cpu")
    expected = talk(forgetful, questions)
    work = Work(predictor)
    assert talk(forgetful, questions) == expected
    without, work.num_positions, num_images = work.num_positions, 0, work.num_images
    work.num_images = 0
    assert talk(predictor, questions) == expected
    assert (num_images, work.num_images) == (3, 1)
    assert work.num_positions < without * 0.7


def test_the_same_question_again_reads_one_position(predictor: Predictor) -> None:
    work = Work(predictor)
    first = talk(predictor, ["What is in the image?"])
    read = work.num_positions
    assert talk(predictor, ["What is in the image?"]) == first
    assert work.num_positions - read <= SHORT.max_new_tokens
    assert work.num_images == 1


def test_another_image_is_never_answered_from_the_first(predictor: Predictor) -> None:
    forgetful = Predictor(predictor.model, predictor.processor, device="cpu")
    expected = talk(forgetful, ["What?", "And?"], "square")
    talk(predictor, ["What?", "And?"], "circle")
    assert talk(predictor, ["What?", "And?"], "square") == expected


def test_a_chat_that_was_broken_off_goes_on_right(predictor: Predictor) -> None:
    forgetful = Predictor(predictor.model, predictor.processor, device="cpu")
    expected = talk(forgetful, ["What is it?", "Which colour?"])
    cancel = threading.Event()
    stream = predictor.stream(Query((image(),), (Turn("user", "What is it?"),)), SHORT, cancel=cancel)
    next(stream)
    cancel.set()
    list(stream)
    abandoned = predictor.stream(Query((image(),), (Turn("user", "What is it?"),)), SHORT)
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


def test_two_chats_take_turns_without_forgetting(predictor: Predictor) -> None:
    work = Work(predictor)
    chats = {kind: (Turn("user", f"What is this {kind}?"),) for kind in ("circle", "square")}
    for _ in range(2):
        for kind, turns in chats.items():
            answer = "".join(predictor.stream(Query((image(kind),), turns), SHORT))
            chats[kind] = (*turns, Turn("assistant", answer), Turn("user", "More?"))
    assert work.num_images == 2
    assert predictor._chat_reader.chats is not None
    assert predictor._chat_reader.chats.num_hits == 2


@pytest.mark.slow
def test_fixed_keys_and_values_write_what_growing_ones_do(tmp_path: Path) -> None:
    """Alone, sampled, in batches, and again in a cache that was used before; room is a multiple of 256."""
    growing = Predictor.open(make_bundle(tmp_path / "bundle"), device="cpu")
    fixed = Predictor(growing.model, growing.processor, device="cpu", is_fixed=True)
    queries = [Query((image("circle"),), (Turn("user", text),)) for text in ("What?", "Which colour? " * 9)]
    queries += [Query((), (Turn("user", "no image"),)), Query((image(), image("square")), queries[0].turns)]
    for decoding in (SHORT, Decoding(max_new_tokens=12, temperature=0.8, top_p=0.9, seed=2)):
        for batch_size in (1, 4):
            expected = growing.answer(queries, decoding, batch_size=batch_size)
            assert fixed.answer(queries, decoding, batch_size=batch_size) == expected
    assert len(set(expected)) == len(expected)
    assert len(fixed._pool._idle) == 1, "one cache has served them all"  # type: ignore[union-attr]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_the_recorded_step_writes_what_the_plain_one_does(tmp_path: Path) -> None:
    recorded = Predictor.open(make_bundle(tmp_path / "bundle"), device="cuda")
    plain = Predictor(recorded.model, recorded.processor, device="cuda")
    assert recorded._pool is not None
    query = Query((image(),), (Turn("user", "What is it?"),))
    for _ in range(2):
        assert recorded.answer([query], SHORT) == plain.answer([query], SHORT)
    assert recorded._pool._idle[0]._graphs
    assert talk(recorded, ["What is it?", "Which colour?"]) == talk(plain, ["What is it?", "Which colour?"])


def test_answers_that_are_kept_are_given_again_to_the_same_query_only(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    plain, keeping = Predictor.open(bundle, device="cpu"), Predictor.open(bundle, device="cpu", num_answers=2)
    queries = [Query((image(kind),), (Turn("user", "What?"),)) for kind in ("circle", "square")]
    hot = Decoding(max_new_tokens=16, temperature=1.0, seed=1)
    expected = plain.answer(queries, SHORT)
    assert keeping.answer(queries[:1], SHORT) == expected[:1]
    work = Work(keeping)
    assert keeping.answer(queries, SHORT) == expected
    assert work.num_images == 1, "the first was known"
    assert keeping.answer(queries, SHORT) == expected
    assert work.num_images == 1
    assert keeping.answer(queries[:1], hot) == plain.answer(queries[:1], hot)
    assert work.num_images == 2, "another decoding is another answer, and pushes out the one not asked for longest"
    assert keeping.answer(queries[:1], SHORT) == expected[:1]
    assert work.num_images == 3
