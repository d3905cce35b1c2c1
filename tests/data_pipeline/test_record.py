"""A sample's files as images and turns: the layouts that are taken, and what is wrong with the others."""

from __future__ import annotations

import json
from typing import Any

import pytest

from data_pipeline.record import (
    Record,
    RecordError,
    Turn,
    check_turns,
    image_extensions,
    place_image_tag,
    read_record,
)
from models.spec import IMAGE_TOKEN

ASKED = {"from": "human", "value": f"What is it? {IMAGE_TOKEN}"}
ANSWERED = {"from": "gpt", "value": "A cat."}


def chat(*turns: Any, **more: Any) -> bytes:
    return json.dumps({"conversations": turns, **more}).encode()


def test_a_conversation_with_its_image_tag_in_front() -> None:
    found = read_record({"jpg": b"pixels", "json": chat(ASKED, ANSWERED, id=7)})
    turns = (Turn("user", f"{IMAGE_TOKEN}\nWhat is it?"), Turn("assistant", "A cat."))
    assert found == Record((b"pixels",), turns)


def test_roles_and_contents_in_the_words_of_openai() -> None:
    content = chat(
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    )
    assert read_record({"json": content}).turns == (
        Turn("system", "Be kind."),
        Turn("user", "a"),
        Turn("assistant", "b"),
    )


@pytest.mark.parametrize(
    ("files", "question"),
    [
        ({"txt": b" A cat.\n"}, ""),
        ({"txt": b"A cat.", "jpg": b""}, IMAGE_TOKEN),
        ({"json": b'{"text": "A cat.", "prompt": "Say it."}', "jpg": b""}, f"{IMAGE_TOKEN}\nSay it."),
        ({"json": b'{"other": 1}', "txt": b"A cat."}, ""),
        ({"json": b'\xef\xbb\xbf{"text": "A cat."}'}, ""),
    ],
    ids=["caption", "with an image", "json", "json without text", "byte order mark"],
)
def test_captions_are_conversations_of_two_turns(files: dict[str, bytes], question: str) -> None:
    assert read_record(files).turns == (Turn("user", question), Turn("assistant", "A cat."))


def test_images_are_in_the_order_of_their_numbers() -> None:
    names = ["10.jpg", "json", "2.png", "seg.png", "txt", "jpg", "1.WEBP"]
    assert image_extensions(dict.fromkeys(names)) == ["jpg", "2.png", "10.jpg"]


@pytest.mark.parametrize(
    ("text", "placed"),
    [
        (f"What is it? {IMAGE_TOKEN}", f"{IMAGE_TOKEN}\nWhat is it?"),
        (IMAGE_TOKEN, IMAGE_TOKEN),
        (f"Compare {IMAGE_TOKEN} and {IMAGE_TOKEN}.", f"Compare {IMAGE_TOKEN} and {IMAGE_TOKEN}."),
        ("No image.", "No image."),
    ],
)
def test_a_single_image_tag_goes_to_the_front(text: str, placed: str) -> None:
    assert place_image_tag(text) == placed


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"jpg": b""}, "no text"),
        ({"txt": b"\xff\xfe"}, "not UTF-8"),
        ({"json": b"{"}, "cannot be read"),
        ({"json": b"[" * 100_000}, "cannot be read"),
        ({"json": b"[]"}, "is a list"),
        ({"json": b"{}"}, "neither `conversations` nor `text`"),
        ({"json": chat()}, "empty or not a list"),
        ({"json": chat("a")}, "not an object"),
        ({"json": chat({"from": "narrator", "value": "a"})}, "turn by 'narrator'"),
        ({"json": chat(ASKED, ANSWERED)}, "0 images but 1"),
        ({"mp4": b"", "jpg": b"", "txt": b"A cat."}, "mp4 is a video, which is not read: put frames"),
        ({"0.webm": b"", "txt": b"A cat."}, "0.webm is a video"),
        ({"json": b'{"videos": ["a.mp4"], "text": "A cat."}'}, "`videos` of the JSON names a video"),
        ({"json": chat({"role": "user", "content": [{"type": "video"}]})}, "a turn holds a video"),
        ({"json": chat({"from": "human", "value": "a"}, {"from": "gpt", "value": " "})}, "answers are empty"),
        ({"json": b'{"text": "half \\ud83d"}'}, r"half of a character \(U\+D83D\)"),
    ],
)
def test_files_that_make_no_conversation(files: dict[str, bytes], reason: str) -> None:
    with pytest.raises(RecordError, match=reason):
        read_record(files)


@pytest.mark.parametrize(
    ("turns", "images", "reason"),
    [
        ((Turn("user", "a"),), 0, "alternate"),
        ((Turn("assistant", "a"), Turn("user", "b")), 0, "alternate"),
        ((), 0, "alternate"),
        ((Turn("user", "a"), Turn("assistant", "b")), 1, "1 images but 0"),
        ((Turn("user", IMAGE_TOKEN), Turn("assistant", IMAGE_TOKEN)), 1, "outside"),
    ],
)
def test_conversations_that_cannot_be(turns: tuple[Turn, ...], images: int, reason: str) -> None:
    with pytest.raises(RecordError, match=reason):
        check_turns(turns, images)
