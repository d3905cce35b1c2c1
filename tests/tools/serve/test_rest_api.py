"""The REST API: forms, conversations, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from data_pipeline.record import Turn
from eval.predictor import Decoding, Predictor, Query
from tests.support.bundles import image
from tests.support.patience import GUARD_S
from tests.support.servers import Running, data_url, file_of
from tools.serve.conversations import Conversation, Conversations
from tools.serve.errors import ApiError
from tools.serve.rest_api import CAPTION


@pytest.fixture(scope="module")
def wire(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=GUARD_S) as made:
        yield made


def answered(predictor: Predictor, *turns: str, picture: bool = True) -> str:
    roles = ("user", "assistant") * len(turns)
    chat = tuple(Turn(role, text) for role, text in zip(roles, turns, strict=False))  # type: ignore[arg-type]
    images = (image("circle"),) if picture else ()
    return predictor.answer([Query(images, chat)], Decoding(max_new_tokens=8))[0]


def form(wire: httpx.Client, path: str, file: bytes | None = None, **fields: Any) -> httpx.Response:
    files = {"image": ("photo.png", file_of() if file is None else file)}
    return wire.post(path, files=files, data={"max_new_tokens": "8", **fields})


def test_a_caption_and_an_answer(wire: httpx.Client, tiny_predictor: Predictor) -> None:
    caption = form(wire, "/caption").json()
    assert caption["caption"] == answered(tiny_predictor, CAPTION)
    assert caption["tokens"] == 8
    assert caption["seconds"] > 0
    prompted = form(wire, "/caption", prompt="Which colour?").json()
    assert prompted["caption"] == answered(tiny_predictor, "Which colour?")
    assert form(wire, "/question", question="Which colour?").json()["answer"] == prompted["caption"]


@pytest.mark.parametrize(
    ("path", "options", "param"),
    [
        ("/caption", {"file": b"no image"}, "image"),
        ("/caption", {"max_new_tokens": "0"}, "max_new_tokens"),
        ("/caption", {"max_new_tokens": "many"}, "max_new_tokens"),
        ("/question", {}, "question"),
        ("/question", {"question": "  "}, "question"),
        ("/question", {"question": "many shapes? " * 300}, "question"),
    ],
)
def test_a_bad_form_is_told_which_field(wire: httpx.Client, path: str, options: dict[str, Any], param: str) -> None:
    answer = form(wire, path, **options)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_a_form_without_an_image_and_what_is_no_form(wire: httpx.Client) -> None:
    without = wire.post("/caption", files={"other": ("a", b"b")})
    assert (without.status_code, without.json()["error"]["param"]) == (400, "image")
    as_text = wire.post("/caption", files={"image": (None, "text")})
    assert (as_text.status_code, as_text.json()["error"]["param"]) == (400, "image")
    assert wire.post("/caption", json={}).status_code == 415
    broken = {"content-type": "multipart/form-data; boundary=x"}
    assert wire.post("/caption", content=b"--y\r\nnonsense", headers=broken).status_code == 400
    assert wire.post("/caption", content=b"x", headers={"content-type": "multipart/form-data"}).status_code == 400


def chat(wire: httpx.Client, message: str, **more: Any) -> dict[str, Any]:
    answer = wire.post("/chat", json={"message": message, "max_new_tokens": 8, **more})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_a_conversation_goes_on_with_its_picture(wire: httpx.Client, tiny_predictor: Predictor) -> None:
    first = chat(wire, "What is it?", image_base64=data_url(file_of()))
    assert first["answer"] == answered(tiny_predictor, "What is it?")
    second = chat(wire, "Which colour?", conversation_id=first["conversation_id"])
    assert second["conversation_id"] == first["conversation_id"]
    assert second["answer"] == answered(tiny_predictor, "What is it?", first["answer"], "Which colour?")
    anew = chat(wire, "Which colour?", conversation_id=first["conversation_id"], image_base64=data_url(file_of()))
    assert anew["answer"] == answered(tiny_predictor, "Which colour?")


def test_a_conversation_can_be_named_forgotten_and_begun_without_a_picture(
    wire: httpx.Client, tiny_predictor: Predictor
) -> None:
    alone = answered(tiny_predictor, "What is it?", picture=False)
    assert chat(wire, "What is it?", conversation_id="mine")["answer"] == alone
    assert wire.delete("/chat/mine").status_code == 204
    assert wire.delete("/chat/mine").status_code == 404
    assert chat(wire, "What is it?", conversation_id="mine")["answer"] == alone


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "message"),
        ({"message": ""}, "message"),
        ({"message": "  "}, "message"),
        ({"message": 5}, "message"),
        ({"message": "a", "conversation_id": ""}, "conversation_id"),
        ({"message": "a", "conversation_id": "x" * 200}, "conversation_id"),
        ({"message": "a", "image_base64": "@@"}, "image_base64"),
        ({"message": "a", "image_base64": data_url(b"no image")}, "image_base64"),
        ({"message": "a", "max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_a_bad_message_is_told_which_field(wire: httpx.Client, body: dict[str, Any], param: str) -> None:
    answer = wire.post("/chat", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_conversations_are_bounded_in_bytes_and_time() -> None:
    now_s = [0.0]
    kept = Conversations(max_bytes=10_000, kept_s=60, clock=lambda: now_s[0])
    for number in range(5):
        kept.keep("alice", str(number), Conversation(bytes(2000)).asked("a"))
    assert [bool(kept.find("alice", str(number)).turns) for number in range(5)] == [False, False, True, True, True]
    assert kept.num_bytes <= 10_000
    kept.keep("alice", "large", Conversation(bytes(20_000)))
    assert kept.find("alice", "large") == Conversation()
    assert kept.find("bob", "4") == Conversation(), "an id is its client's own"
    now_s[0] = 61
    assert kept.find("alice", "4") == Conversation()
    assert (len(kept), kept.num_bytes) == (0, 0)


def test_two_messages_of_one_conversation_do_not_cross() -> None:
    kept = Conversations()
    with kept.turn("alice", "1"):
        with pytest.raises(ApiError, match="being answered") as busy, kept.turn("alice", "1"):
            pass
        assert busy.value.status == 409
        with kept.turn("bob", "1"), kept.turn("alice", "2"):
            pass
    with kept.turn("alice", "1"):
        pass
