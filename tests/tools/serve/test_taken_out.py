"""What is taken out of a JSON body comes back the same, and nothing else changes."""

from __future__ import annotations

import base64
import json
import random
from typing import Any

import httpx
import pytest
from PIL import Image

from data_pipeline.record import Turn
from eval.predictor import Decoding, Predictor, Query
from tests.support.patience import GUARD_S
from tests.support.servers import Running, asking, data_url, file_of, picture_part
from tools.serve.taken_out import MIN_BYTES, take_out

LONG = base64.b64encode(random.Random(0).randbytes(MIN_BYTES)).decode()


def put_back(value: Any, taken: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {name: put_back(each, taken) for name, each in value.items()}
    if isinstance(value, list):
        return [put_back(each, taken) for each in value]
    return taken.get(value, value) if isinstance(value, str) else value


@pytest.mark.parametrize(
    ("value", "num_taken"),
    [
        ({"url": LONG}, 1),
        ([{"url": LONG}, {"url": "short"}, {"text": "url"}, {"url": LONG + "="}, {"url": LONG}], 3),
        ({"text": LONG, "urls": LONG, "url ": LONG, "URL": LONG}, 0),
        ({"url": LONG + '"' + LONG}, 0),
        ({"url": "\\" + LONG, "next": {"url": LONG}}, 1),
        ({"text": f'"url": "{LONG}"', "url": [LONG]}, 0),
        ({"a": "url", "url": None, "b": {"url": {"url": LONG}}}, 1),
        ({"url": LONG[:10] + "ä" + LONG}, 1),
        ([{"url": ""}] * 1001, 0),
    ],
    ids=["one", "several", "other keys", "quote", "backslash", "in a text", "nested", "not ASCII", "many"],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_what_is_taken_out_comes_back(value: Any, num_taken: int, indent: int | None) -> None:
    body = bytearray(json.dumps(value, ensure_ascii=False, indent=indent).encode())
    rest, taken = take_out(body, "url")
    assert len(taken) == num_taken
    found = {name: bytes(each).decode() for name, each in taken.items()}
    assert put_back(json.loads(rest), found) == value
    assert len(rest) < len(body) - num_taken * (MIN_BYTES - 100) or not num_taken


def test_no_name_is_known_before() -> None:
    body = bytearray(json.dumps({"url": LONG}).encode())
    first, second = (set(take_out(body, "url")[1]) for _ in range(2))
    assert not first & second


@pytest.mark.parametrize("end", ["", '"', '"}}', '"{"url": 1}', '", "url": "' + LONG])
def test_what_is_no_json_stays_none(end: str) -> None:
    rest, _ = take_out(bytearray(f'{{"url": "{LONG}{end}'.encode()), "url")
    with pytest.raises(json.JSONDecodeError):
        json.loads(rest)


def test_large_pictures_are_answered_as_by_the_library(server: Running, tiny_predictor: Predictor) -> None:
    noise = Image.frombytes("RGB", (200, 200), random.Random(1).randbytes(120_000))
    file = file_of(noise)
    assert len(file) > MIN_BYTES
    query = Query((noise, noise), (Turn("user", "What?"),))
    alone = Query((noise,), (Turn("user", "What?"),))
    expected, expected_alone = tiny_predictor.answer([query, alone], Decoding(max_new_tokens=12))
    with httpx.Client(base_url=server.url, timeout=GUARD_S) as wire:
        body = asking(picture_part(file), picture_part(file), "What?")
        answer = wire.post("/v1/chat/completions", json=body).json()
        assert answer["choices"][0]["message"]["content"] == expected
        escaped = json.dumps(body).replace("/", "\\/")  # as PHP writes it
        headers = {"Content-Type": "application/json"}
        assert (
            wire.post("/v1/chat/completions", content=escaped, headers=headers).json()["choices"] == answer["choices"]
        )
        for picture in (data_url(file), base64.b64encode(file).decode()):
            chat = {"message": "What?", "image_base64": picture, "max_new_tokens": 12}
            assert wire.post("/chat", json=chat).json()["answer"] == expected_alone


@pytest.mark.parametrize("damage", ["*", "\n", "====", "é"])
def test_large_damaged_base64_is_refused_by_its_field(server: Running, damage: str) -> None:
    url = f"data:image/png;base64,{LONG[:1000]}{damage}{LONG}"
    body = json.dumps(asking({"type": "image_url", "image_url": {"url": url}}, "What?"), ensure_ascii=False)
    body = body.replace("\\n", "\n")
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(server.url + "/v1/chat/completions", content=body.encode(), headers=headers, timeout=GUARD_S)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "image_url")
