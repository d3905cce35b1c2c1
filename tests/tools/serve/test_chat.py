"""A chat of the page is a value, the panel beside it tells of the bundle, and what goes wrong becomes a line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from eval.engine import Engine, EngineLimits
from eval.predictor import Decoding, Predictor, Turn
from models.common.errors import InputError
from tests.support.bundles import image, make_bundle
from tools.serve import panel
from tools.serve.asking import EngineAsker
from tools.serve.budget import Budget
from tools.serve.chat import Cancel, Chat, reply


@pytest.mark.slow
def test_whatever_goes_wrong_while_answering_becomes_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    predictor = Predictor.open(make_bundle(tmp_path / "bundle"), device="cpu")
    chat = Chat().asked(str(tmp_path / "gone.png"), "What is it?")
    assert "gone.png" in list(reply(predictor, chat, Decoding()))[-1].error
    predictor.model.model.language_model = None
    last = list(reply(predictor, Chat().asked(None, "What?"), Decoding()))[-1]
    assert "something went wrong" in last.error
    assert last.chat.turns == (), "a question without an answer would stand in the way of the next one"
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("is_engine", [False, True], ids=["predictor", "engine"])
def test_an_answer_without_a_word_is_told_and_keeps_the_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_engine: bool
) -> None:
    predictor = Predictor.open(make_bundle(tmp_path / "bundle"), device="cpu")
    end_id = predictor.processor.tokenizer.eos_token_id
    monkeypatch.setattr("eval.batch.choose_tokens", lambda logits, *_: torch.full((len(logits),), end_id))
    engine, cancel = Engine(predictor, EngineLimits()), Cancel()
    engine.start()
    try:
        asker: Any = EngineAsker(engine, Budget(1), 1.0) if is_engine else predictor
        last = list(reply(asker, Chat().asked(None, "What?"), Decoding(), cancel))[-1]
    finally:
        engine.close()
    assert [turn.text for turn in last.chat.turns] == ["What?", ""]
    assert "without a word" in last.error
    assert last.speed.startswith("1 token")
    assert not cancel.is_set()


@pytest.mark.slow
def test_another_question_about_an_image_decodes_nothing(tmp_path: Path) -> None:
    predictor = Predictor.open(make_bundle(tmp_path / "bundle"), device="cpu")
    drawn = tmp_path / "circle.png"
    image("circle").save(drawn)
    decoding = Decoding(max_new_tokens=8)
    engine, budget = Engine(predictor, EngineLimits()).start(), Budget(10_000_000)
    try:
        asker = EngineAsker(engine, budget, 0.1)
        first = list(reply(asker, Chat().asked(str(drawn), "What?"), decoding))[-1].chat
        with budget.taken_by_thread(10_000_000, 0.1):
            second = list(reply(asker, first.asked(str(drawn), "And?"), decoding))[-1]
            fresh = tmp_path / "square.png"
            image("square").save(fresh)
            other = list(reply(asker, Chat().asked(str(fresh), "What?"), decoding))[-1]
    finally:
        engine.close()
    alone = list(reply(predictor, first.asked(str(drawn), "And?"), decoding))[-1]
    assert second.chat == alone.chat
    assert "ask again later" in other.error


def test_a_chat_is_a_value() -> None:
    chat = Chat().asked("a.png", " one ").answered("two").asked("a.png", "three").answered("four")
    assert [turn.text for turn in chat.turns] == ["one", "two", "three", "four"]
    again = chat.again()
    assert (again.turns, again.num_retries) == (chat.turns[:3], 1)
    assert chat.asked("b.png", "five").turns == (Turn("user", "five"),)
    with pytest.raises(InputError, match="no answer yet"):
        Chat().again()


@pytest.mark.slow
def test_the_panel_tells_recipe_precision_parity_and_speed(tmp_path: Path) -> None:
    predictor = Predictor.open(make_bundle(tmp_path / "bundle"), device="cpu")
    html = panel.facts(predictor, [10.0, 30.0, 20.0])
    for expected in ("tiny_random / lora", "fp32", "Share of same choices", "20.0 tokens/s (median of 3 answers)"):
        assert expected in html
    assert "tiny_random / lora" in panel.header(predictor)
    assert panel.notice("<b>") == '<p class="notice" role="alert">&lt;b&gt;</p>'
