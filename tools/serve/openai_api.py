"""OpenAI's addresses: POST /v1/chat/completions, GET /v1/models, GET /v1/models/ID."""

from __future__ import annotations

from contextlib import AsyncExitStack
from functools import partial
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from eval.decoding import Decoding
from eval.prompts import Prompt
from tools.serve.answer import Answer
from tools.serve.body import INLINE_BYTES, parse_json
from tools.serve.gate import Visit, visit_of
from tools.serve.question import Question, of_messages
from tools.serve.responses import EventStream, until_gone
from tools.serve.service import Service
from tools.serve.settings import Settings
from tools.serve.taken_out import take_out
from tools.serve.wire import ChatRequest, Completion, check_model, model_card, usage_of


def openai_api(service: Service) -> APIRouter:
    """The routes, for one service."""
    router, settings = APIRouter(tags=["OpenAI"]), service.settings
    body = {"requestBody": {"content": {"application/json": {"schema": ChatRequest.model_json_schema()}}}}

    @router.post("/v1/chat/completions", openapi_extra=body, response_model=None, summary="Answer a chat")
    async def complete(request: Request) -> Response:
        visit = visit_of(request.scope)
        async with AsyncExitStack() as held:
            held.enter_context(service.shares.one_more(visit.client))
            asked, decoding, prompt = await _prepared(service, request)
            if asked.stream:
                answer = await until_gone(request, service.begin(prompt, decoding, visit))
                return _stream(answer, asked, visit, settings, held.pop_all())
            text, ended = await until_gone(request, service.text(prompt, decoding, visit))
            usage = usage_of(ended.prompt_tokens, ended.tokens)
            return JSONResponse(_completion(visit, settings).whole(text, ended.reason, usage))

    @router.get("/v1/models", summary="The one model that is served")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model_card(settings.model, service.started_s)]}

    @router.get("/v1/models/{model:path}", summary="The model of that name")
    async def model(model: str) -> dict[str, Any]:
        check_model(model, settings.model)
        return model_card(settings.model, service.started_s)

    return router


async def _prepared(service: Service, request: Request) -> tuple[ChatRequest, Decoding, Prompt]:
    """The request without its body, which is let go before it waits for its answer."""
    async with service.bodies.read(request, "application/json") as raw:
        parse = partial(_parse, raw, service.settings.model)
        asked, question = parse() if len(raw) <= INLINE_BYTES else await service.in_thread(parse)
        decoding = asked.decoding(service.settings.limits)
        prompt = await until_gone(request, service.prepare(question, decoding))
        return asked.model_copy(update={"messages": []}), decoding, prompt


def _parse(raw: bytearray, served: str) -> tuple[ChatRequest, Question]:
    body, taken = take_out(raw, "url")
    asked = parse_json(ChatRequest, body)
    asked.check(served)
    return asked, of_messages(asked.messages, taken)


def _stream(answer: Answer, asked: ChatRequest, visit: Visit, settings: Settings, held: AsyncExitStack) -> Response:
    with_usage = bool(asked.stream_options and asked.stream_options.include_usage)
    completion = _completion(visit, settings, with_usage=with_usage)
    return EventStream(answer, completion, held, with_usage=with_usage, limit_s=settings.times.answer_s)


def _completion(visit: Visit, settings: Settings, *, with_usage: bool = False) -> Completion:
    """It has the number of its request, by which the log is found."""
    return Completion("chatcmpl-" + visit.number, settings.model, with_usage=with_usage)
