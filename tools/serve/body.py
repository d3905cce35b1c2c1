"""Reading a request's body: bounded before and while it is read, and never to the disk."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.datastructures import FormData
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from tools.serve.budget import Budget
from tools.serve.errors import ApiError, invalid, of_validation
from tools.serve.settings import MEGABYTE, RequestLimits, Times

Parsed = TypeVar("Parsed", bound=BaseModel)

_LINGER_S = 2.0
"""How long a body that is too large is read on and thrown away: a connection that is closed before loses its answer."""

_COPIES = 2
"""What a body takes: the bytes, and the pictures that they hold in base64."""

INLINE_BYTES = 1 << 16
"""Bodies up to this size are parsed, and files' headers read, on the event loop: to change threads takes longer."""

_PARSING = threading.Lock()
_PAUSE_S = 0.001

_FIELD_BYTES = 1_000_000
_MAX_FIELDS = 32
_PIECE = 1 << 20


class TooLargeError(ApiError):
    """413. Ends the connection, since the rest of the body would have to be read first."""

    def __init__(self, max_bytes: int) -> None:
        text = f"the body is larger than {max_bytes / MEGABYTE:g} MB"
        super().__init__(413, text, code="body_too_large", headers={"Connection": "close"})

    def response(self) -> JSONResponse:
        """See `ApiError`."""
        return _Lingering(self.body(), self.status, self.headers)


class _Lingering(JSONResponse):
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(_throw_away(receive), _LINGER_S)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _throw_away(receive: Receive) -> None:
    while True:
        message = await receive()
        if message["type"] == "http.disconnect" or not message.get("more_body"):
            return


class Bodies:
    """Reads bodies; those that are not small share a budget until the request's pictures are decoded."""

    def __init__(self, limits: RequestLimits, times: Times) -> None:
        self._limits, self._times = limits, times
        self.budget = Budget(max(limits.picture_bytes // 4, _COPIES * limits.max_body_bytes))

    @asynccontextmanager
    async def read(self, request: Request, content_type: str) -> AsyncIterator[bytearray]:
        """The body, of which a part of the memory is held within the block. Not as bytes: a copy takes 0.1 s for 67 MB.

        Raises:
            ApiError: 415 for another content type, 413 for too many bytes, 408 for a slow sender, 503 for no room.
        """
        found = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if found != content_type:
            raise ApiError(415, f"this address takes {content_type}, not {found or 'a body without a type'}")
        length = self._length(request)
        async with AsyncExitStack() as held:
            if length is None or length > self._limits.small_body_bytes:
                await held.enter_async_context(self._room(self._limits.max_body_bytes if length is None else length))
            yield await self._bytes(request)

    @asynccontextmanager
    async def _room(self, length: int) -> AsyncIterator[None]:
        async with AsyncExitStack() as held:
            try:
                await held.enter_async_context(self.budget.taken(_COPIES * length, self._times.queue_s))
            except asyncio.TimeoutError:
                text = "many large requests are being read: ask again later"
                raise ApiError(503, text, code="overloaded", retry_after_s=5, reason="bodies") from None
            yield

    def _length(self, request: Request) -> int | None:
        text = request.headers.get("content-length")
        if text is None:
            return None
        if not text.isdecimal():
            raise invalid("Content-Length is no number")
        if int(text) > self._limits.max_body_bytes:
            raise TooLargeError(self._limits.max_body_bytes)
        return int(text)

    async def _bytes(self, request: Request) -> bytearray:
        try:
            return await asyncio.wait_for(self._all(request), self._times.body_s)
        except asyncio.TimeoutError:
            text = f"the body did not come within {self._times.body_s:g} s"
            raise ApiError(408, text, headers={"Connection": "close"}) from None

    async def _all(self, request: Request) -> bytearray:
        found = bytearray()
        try:
            async for piece in request.stream():
                found += piece
                if len(found) > self._limits.max_body_bytes:
                    raise TooLargeError(self._limits.max_body_bytes)
        except ClientDisconnect:
            raise ApiError(400, "the connection ended within the body") from None
        return found


def parse_json(model: type[Parsed], body: bytes | bytearray) -> Parsed:
    """A JSON body as a value.

    The interpreter is nobody else's while JSON is read, 0.1 s for 55 MB: of large bodies one is read at a time, and
    whoever waits comes in between.

    Raises:
        ApiError: 400, it is none.
    """
    try:
        if len(body) <= INLINE_BYTES:
            return model.model_validate_json(body)
        with _PARSING:
            parsed = model.model_validate_json(body)
            time.sleep(_PAUSE_S)
            return parsed
    except ValidationError as error:
        raise of_validation(error) from None


class _InMemory(MultiPartParser):
    spool_max_size = 1 << 40  # nothing of a visitor's is written to a disk


async def parse_form(request: Request, body: bytearray) -> FormData:
    """The fields and files of a multipart body.

    Raises:
        ApiError: 400, it is no such body.
    """

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(body), _PIECE):
            yield bytes(body[start : start + _PIECE])
            await asyncio.sleep(0)  # others are served between

    parser = _InMemory(request.headers, pieces(), max_files=1, max_fields=_MAX_FIELDS, max_part_size=_FIELD_BYTES)  # type: ignore[arg-type]
    try:
        return await parser.parse()
    except (MultiPartException, KeyError, UnicodeError, ValueError) as error:
        text = error.message if isinstance(error, MultiPartException) else "the form cannot be read"
        raise invalid(text) from None
