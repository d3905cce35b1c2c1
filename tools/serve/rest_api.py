"""A REST API for programs without a client library: POST /caption and /question (forms), POST /chat (JSON).

    /caption   image=@file [prompt] [max_new_tokens]        -> {"caption", "tokens", "seconds"}
    /question  image=@file question [max_new_tokens]        -> {"answer", "tokens", "seconds"}
    /chat      {"message", "image_base64"?, "conversation_id"?, "max_new_tokens"?}
                                                            -> {"answer", "conversation_id", "tokens", "seconds"}
    DELETE /chat/ID                                         -> 204

A chat goes on where its conversation_id ended, with its picture; a new picture begins it anew.
"""

from __future__ import annotations

import secrets
import time
from contextlib import ExitStack
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import Response

from data_pipeline.record import Turn
from eval.decoding import Decoding
from tools.serve.body import parse_form, parse_json
from tools.serve.conversations import Conversation, Conversations, check_name
from tools.serve.errors import ApiError, invalid
from tools.serve.gate import visit_of
from tools.serve.question import Question, is_data_url, read_base64, read_url
from tools.serve.responses import until_gone
from tools.serve.service import Service
from tools.serve.settings import RequestLimits
from tools.serve.taken_out import take_out
from tools.serve.wire import Wire

CAPTION = "Describe the image."
"""What /caption asks where the request does not say."""


class ChatMessage(Wire):
    """The body of POST /chat."""

    message: Annotated[str, Field(min_length=1)]
    image_base64: str | None = None
    conversation_id: str | None = None
    max_new_tokens: Annotated[int, Field(ge=1)] | None = None


def rest_api(service: Service, conversations: Conversations) -> APIRouter:
    """The routes, for one service."""
    router, limits = APIRouter(tags=["REST"]), service.settings.limits

    async def answered(request: Request, *, field: str, default: str | None) -> tuple[str, dict[str, Any]]:
        started_s = time.monotonic()
        visit = visit_of(request.scope)
        with service.shares.one_more(visit.client):
            async with service.bodies.read(request, "multipart/form-data") as body:
                question, decoding = await _of_form(request, body, limits, field=field, default=default)
                prompt = await until_gone(request, service.prepare(question, decoding))
            text, ended = await until_gone(request, service.text(prompt, decoding, visit))
        return text, {"tokens": ended.tokens, "seconds": round(time.monotonic() - started_s, 4)}

    @router.post("/caption", openapi_extra=_form("prompt"), summary="Describe an image")
    async def caption(request: Request) -> dict[str, Any]:
        text, facts = await answered(request, field="prompt", default=CAPTION)
        return {"caption": text, **facts}

    @router.post("/question", openapi_extra=_form("question"), summary="Answer a question about an image")
    async def question(request: Request) -> dict[str, Any]:
        text, facts = await answered(request, field="question", default=None)
        return {"answer": text, **facts}

    schema = {"requestBody": {"content": {"application/json": {"schema": ChatMessage.model_json_schema()}}}}

    @router.post("/chat", openapi_extra=schema, summary="Begin a conversation, or go on with one")
    async def chat(request: Request) -> dict[str, Any]:
        started_s, visit = time.monotonic(), visit_of(request.scope)
        with service.shares.one_more(visit.client), ExitStack() as held:
            async with service.bodies.read(request, "application/json") as body:
                sent, picture = await service.in_thread(partial(_of_json, body))
                name = check_name(sent.conversation_id) if sent.conversation_id is not None else _new_name()
                held.enter_context(conversations.turn(visit.client, name))
                before = conversations.find(visit.client, name) if picture is None else Conversation(picture)
                asked = before.asked(sent.message)
                decoding = _decoding(sent.max_new_tokens, limits)
                prompt = await until_gone(request, service.prepare(_question(asked), decoding))
            text, ended = await until_gone(request, service.text(prompt, decoding, visit))
            conversations.keep(visit.client, name, asked.answered(text))
        facts = {"tokens": ended.tokens, "seconds": round(time.monotonic() - started_s, 4)}
        return {"answer": text, "conversation_id": name, **facts}

    @router.delete("/chat/{conversation_id}", status_code=204, response_model=None, summary="Forget a conversation")
    async def forget(request: Request, conversation_id: str) -> Response:
        if not conversations.forget(visit_of(request.scope).client, conversation_id):
            raise ApiError(404, "there is no such conversation", code="not_found", param="conversation_id")
        return Response(status_code=204)

    return router


def _question(asked: Conversation) -> Question:
    return Question(
        asked.turns, () if asked.picture is None else (asked.picture,), param="message", picture_param="image_base64"
    )


def _of_json(body: bytearray) -> tuple[ChatMessage, bytes | str | None]:
    rest, taken = take_out(body, "image_base64")
    sent = parse_json(ChatMessage, rest)
    if not sent.message.strip():
        raise invalid("there is no message yet: write one", "message")
    if sent.image_base64 is None:
        return sent, None
    image = taken.get(sent.image_base64, sent.image_base64)
    read = read_url if is_data_url(image) else read_base64
    return sent, read(image, "image_base64")


async def _of_form(
    request: Request, body: bytearray, limits: RequestLimits, *, field: str, default: str | None
) -> tuple[Question, Decoding]:
    form = await parse_form(request, body)
    try:
        image = form.get("image")
        if not isinstance(image, UploadFile):
            raise invalid("there is no image: send it as the form's file `image`", "image")
        text = form.get(field) or default
        if not isinstance(text, str) or not text.strip():
            raise invalid(f"there is no {field} yet: write one", field)
        question = Question((Turn("user", text),), (await image.read(),), param=field, picture_param="image")
        return question, _decoding(_count(form.get("max_new_tokens")), limits)
    finally:
        await form.close()


def _count(value: object) -> int | None:
    if value is None:
        return None
    if not isinstance(value, str) or not value.isdecimal() or len(value) > 9 or int(value) < 1:
        raise invalid("max_new_tokens is no number above 0", "max_new_tokens")
    return int(value)


def _decoding(max_new_tokens: int | None, limits: RequestLimits) -> Decoding:
    return Decoding(max_new_tokens=min(max_new_tokens or limits.default_tokens, limits.max_tokens))


def _new_name() -> str:
    return "chat-" + secrets.token_urlsafe(18)


def _form(field: str) -> dict[str, Any]:
    """The form of /caption and /question for the documentation."""
    properties = {
        "image": {"type": "string", "format": "binary"},
        field: {"type": "string"},
        "max_new_tokens": {"type": "integer", "minimum": 1},
    }
    schema = {"type": "object", "properties": properties, "required": ["image"]}
    return {"requestBody": {"content": {"multipart/form-data": {"schema": schema}}}}
