"""Answers as HTTP: a stream of server-sent events, or a whole one that ends when its client leaves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable
from contextlib import AsyncExitStack
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from tools.serve.answer import Answer
from tools.serve.errors import ApiError
from tools.serve.wire import Completion, usage_of

Result = TypeVar("Result")

_UNREAD_S = 30.0
"""How long after its answer's limit of time a stream that nobody reads is held."""

DONE = b"data: [DONE]\n\n"


class ClientGoneError(Exception):
    """Whoever asked has left."""


async def until_gone(request: Request, work: Awaitable[Result]) -> Result:
    """The work's result. The body must have been read.

    Raises:
        ClientGoneError: the client left before; the work was cancelled.
    """
    task, has_left = asyncio.current_task(), False
    assert task is not None

    async def watch() -> None:
        nonlocal has_left
        while (await request.receive())["type"] != "http.disconnect":
            pass
        has_left = True
        task.cancel()

    watching = asyncio.ensure_future(watch())
    try:
        return await work
    except asyncio.CancelledError:
        if not has_left:
            raise
        if hasattr(task, "uncancel"):  # Python 3.11 counts
            task.uncancel()
        raise ClientGoneError from None
    finally:
        watching.cancel()


class EventStream(StreamingResponse):
    """Chunks of one answer as server-sent events.

    Args:
        answer: has begun, so that what is wrong with the request was said before.
        completion: makes the chunks.
        with_usage: whether the last one says what it took.
        held: is given back at the end, whichever it is.
        limit_s: after which a client that does not read is left.
    """

    def __init__(
        self, answer: Answer, completion: Completion, held: AsyncExitStack, *, with_usage: bool, limit_s: float
    ) -> None:
        events = _events(answer, completion, with_usage=with_usage)
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._answer, self._held, self._limit_s = answer, held, limit_s + _UNREAD_S

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See `starlette.responses.Response`."""
        try:
            await asyncio.wait_for(super().__call__(scope, receive, send), self._limit_s)
        except asyncio.TimeoutError:
            return  # an answer without its end: the connection is closed
        finally:
            self._answer.cancel()
            await self._held.aclose()


async def _events(answer: Answer, completion: Completion, *, with_usage: bool) -> AsyncIterator[bytes]:
    yield _event(completion.chunk({"role": "assistant", "content": ""}))
    try:
        async for text in answer.pieces():
            yield _event(completion.chunk({"content": text})) if text else b": keep-alive\n\n"
    except ApiError as error:
        yield _event(error.body())
        return
    ended = answer.ended
    assert ended is not None
    yield _event(completion.chunk({}, ended.reason))
    if with_usage:
        yield _event(completion.usage_chunk(usage_of(ended.prompt_tokens, ended.tokens)))
    yield DONE


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
