"""Questions as clients of OpenAI's API send them."""

from __future__ import annotations

from typing import Any

import httpx
import openai
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tests.support.servers import asking

QUESTION = "What is in the picture?"


def complete(client: openai.OpenAI, *content: dict[str, Any] | str, **more: Any) -> ChatCompletion:
    found: ChatCompletion = client.chat.completions.create(**asking(*content, **more))
    return found


def stream(client: openai.OpenAI, *content: dict[str, Any] | str, **more: Any) -> list[ChatCompletionChunk]:
    return list(client.chat.completions.create(**asking(*content, stream=True, **more)))


def text_of(answer: ChatCompletion) -> str:
    return answer.choices[0].message.content or ""


def sent(wire: httpx.Client, body: Any) -> httpx.Response:
    return wire.post("/v1/chat/completions", json=body)
