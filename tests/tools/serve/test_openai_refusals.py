"""What OpenAI's API refuses, by its own client or as it would come over the wire: in its shape, before any answer."""

from __future__ import annotations

import io
import json
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from eval.predictor import Predictor
from tests.support.openai_clients import QUESTION, complete
from tests.support.patience import GUARD_S
from tests.support.servers import Running, asking, data_url, file_of, picture_part, running_server


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


TALL = [user("a"), {"role": "assistant", "content": "b"}]
BAD: dict[str, tuple[dict[str, Any], int, str | None]] = {
    "unknown model": ({"model": "gpt-9"}, 404, "model"),
    "no messages": ({"messages": []}, 400, "messages"),
    "messages missing": ({"messages": None}, 400, "messages"),
    "unknown role": ({"messages": [{"role": "robot", "content": "x"}]}, 400, "messages"),
    "tool message": ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, 400, "messages"),
    "unknown part": ({"messages": [user([{"type": "input_audio", "input_audio": {}}])]}, 400, "messages"),
    "two user turns": ({"messages": [user("a"), user("b")]}, 400, "messages"),
    "ends with the assistant": ({"messages": TALL}, 400, "messages"),
    "picture without text": ({"messages": [user([picture_part()])]}, 400, "messages"),
    "empty text": ({"messages": [user(" ")]}, 400, "messages"),
    "no content": ({"messages": [user(None)]}, 400, "messages"),
    "assistant's picture": (
        {"messages": [*TALL[:1], {"role": "assistant", "content": [picture_part()]}, user("c")]},
        400,
        "messages",
    ),
    "half a character": ({"messages": [user("\ud83d")]}, 400, None),
    "temperature below": ({"temperature": -1}, 400, "temperature"),
    "temperature above": ({"temperature": 2.1}, 400, "temperature"),
    "temperature text": ({"temperature": "a"}, 400, "temperature"),
    "top_p": ({"top_p": 2}, 400, "top_p"),
    "max_tokens 0": ({"max_tokens": 0}, 400, "max_tokens"),
    "max_tokens -1": ({"max_tokens": -1}, 400, "max_tokens"),
    "max_tokens text": ({"max_tokens": "7"}, 400, "max_tokens"),
    "five stops": ({"stop": list("abcde")}, 400, "stop"),
    "an empty stop": ({"stop": ""}, 400, "stop"),
    "huge seed": ({"seed": 2**70}, 400, "seed"),
    "n": ({"n": 2}, 400, "n"),
    "logprobs": ({"logprobs": True}, 400, "logprobs"),
    "logit_bias": ({"logit_bias": {"1": 5}}, 400, "logit_bias"),
    "presence_penalty": ({"presence_penalty": 1}, 400, "presence_penalty"),
    "response_format": ({"response_format": {"type": "json_object"}}, 400, "response_format"),
    "tools": ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools"),
    "top_k": ({"top_k": 5}, 400, "top_k"),
    "stream_options alone": ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
    "long prompt": ({"messages": [user("many shapes? " * 300)]}, 400, "messages"),
    "long text": ({"messages": [user("x" * 600_000)]}, 400, "messages"),
}


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_done_is_refused_before_any_200(wire: httpx.Client, name: str, streamed: bool) -> None:
    change, status, param = BAD[name]
    if streamed and name == "stream_options alone":
        pytest.skip("is right there")
    answer = wire.post(
        "/v1/chat/completions",
        content=json.dumps({**asking(QUESTION), "stream": streamed, **change}),
        headers={"content-type": "application/json"},
    )
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert error["message"]
    assert "\n" not in error["message"]
    assert answer.headers["x-request-id"].startswith("req-")
    assert wire.get("/v1/models").status_code == 200, "the connection serves the next request"


def test_a_long_prompt_has_the_code_that_clients_look_for(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        complete(client, "many shapes? " * 300)
    assert refused.value.code == "context_length_exceeded"


def url_part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def large_header() -> bytes:
    """A picture beyond the limits that is a few bytes long."""
    stream = io.BytesIO()
    Image.new("1", (11_000, 11_000)).save(stream, "PNG")
    return stream.getvalue()


PICTURES = {
    "by address": ("https://example.org/x.png", "fetched"),
    "private": ("http://127.0.0.1:9/x.png", "fetched"),
    "file": ("file:///etc/passwd", "files of the server"),
    "path": ("/etc/passwd", "files of the server"),
    "not base64": ("data:image/png,abc", "base64"),
    "bad base64": ("data:image/png;base64,@@@", "base64"),
    "no picture": (data_url(b"this is no image"), "no image"),
    "cut short": (data_url(file_of()[:60]), "decoded"),
    "svg": (data_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "svg+xml"), "no image|not an image|HTML or XML"),
    "empty": ("data:image/png;base64,", "empty"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_that_cannot_be_read_is_refused(client: openai.OpenAI, name: str) -> None:
    url, words = PICTURES[name]
    with pytest.raises(openai.BadRequestError, match=words) as refused:
        complete(client, url_part(url), QUESTION)
    assert refused.value.code == "image_url"
    assert "root:" not in str(refused.value)


def test_a_video_is_refused_by_name(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="videos are not read; send frames as image_url"):
        complete(client, {"type": "video_url", "video_url": {"url": "https://example.org/x.mp4"}}, QUESTION)


def test_too_many_pixels_are_refused_from_the_header(client: openai.OpenAI, server: Running) -> None:
    with pytest.raises(openai.BadRequestError, match="pixels"):
        complete(client, picture_part(large_header()), QUESTION)
    assert server.service.pictures.num_taken == 0


def test_too_many_pictures_are_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="9 pictures; at most 8"):
        complete(client, *[picture_part()] * 9, QUESTION)


def test_addresses_are_fetched_where_the_server_does_and_private_ones_never(tiny_predictor: Predictor) -> None:
    with running_server(tiny_predictor, fetches=True) as server:
        answer = httpx.post(
            f"{server.url}/v1/chat/completions",
            json=asking(url_part("http://127.0.0.1/x.png"), QUESTION),
            timeout=GUARD_S,
        )
    assert answer.status_code == 400
    assert "not a public address" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"{", {"content-type": "application/json"}, 400),
        (b"[]", {"content-type": "application/json"}, 400),
        (b"", {"content-type": "application/json"}, 400),
        (b"\xff\xfe", {"content-type": "application/json"}, 400),
        (b"[" * 100_000, {"content-type": "application/json"}, 400),
        (b"{}", {"content-type": "text/plain"}, 415),
        (b"{}", {}, 415),
    ],
    ids=["half", "list", "nothing", "bytes", "deep", "plain text", "no type"],
)
def test_what_is_no_json_has_the_same_shape(
    wire: httpx.Client, content: bytes, headers: dict[str, str], status: int
) -> None:
    answer = wire.post("/v1/chat/completions", content=content, headers=headers)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
