"""From a question to an answer: pictures are decoded within a budget, beside the event loop, and the engine writes.

    Question --fetch, headers--> bytes needed --budget--> decode + encode (threads) --> Prompt --engine.submit--> Answer

Owns the threads, the budgets and what is refused for the load. Does not own HTTP (`app`) or the model (eval.engine).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import TypeVar

from eval.answers import AnswerCache
from eval.decoding import Decoding
from eval.engine import Draining, Ended, Engine, EngineDead, Event, Piece, Refused
from eval.pixels import Pixels
from eval.prompts import Prompt
from eval.query import ImageFile, Query
from models.common.errors import InputError
from tools.serve.answer import Answer, refusal
from tools.serve.body import INLINE_BYTES, Bodies
from tools.serve.budget import Budget, decoding_bytes
from tools.serve.errors import ApiError, invalid
from tools.serve.fetch import fetch
from tools.serve.gate import Visit
from tools.serve.metrics import Metrics, Values, engine_counters, engine_gauges
from tools.serve.outbox import Bridge, Outbox
from tools.serve.question import Question, of_input_error
from tools.serve.settings import MEGABYTE, Settings
from tools.serve.shares import Shares

Result = TypeVar("Result")

_DECODERS, _FETCHERS = 2, 4


class Service:
    """What all addresses share. `open` runs it within an event loop; the engine may come later."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.engine: Engine | None = None
        self.bodies = Bodies(settings.limits, settings.times)
        self.pictures = Budget(settings.limits.picture_bytes)
        self.shares = Shares(settings.load.per_client)
        self.answers: AnswerCache[tuple[Event, ...]] = AnswerCache(settings.load.answers)
        self.metrics = Metrics(self._gauges, self._counters)
        self.started_s = int(time.time())
        self._decoders = ThreadPoolExecutor(_DECODERS, "decode")
        self._fetchers = ThreadPoolExecutor(_FETCHERS, "fetch")
        self._bridge: Bridge[Event] | None = None

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Serve within the block."""
        self._bridge = Bridge()
        try:
            yield
        finally:
            for pool in (self._decoders, self._fetchers):
                pool.shutdown(wait=False, cancel_futures=True)

    @property
    def state(self) -> str:
        """loading, serving, draining or dead."""
        return "loading" if self.engine is None else self.engine.state

    async def in_thread(self, work: Callable[[], Result]) -> Result:
        """Run what takes long beside the event loop; who is cancelled meanwhile holds what he holds until its end."""
        return await self._in(self._decoders, work)

    async def _in(self, pool: ThreadPoolExecutor, work: Callable[[], Result]) -> Result:
        future = asyncio.get_running_loop().run_in_executor(pool, work)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            future.cancel()
            await asyncio.wait([future])
            raise

    async def begin(self, prompt: Prompt, decoding: Decoding, visit: Visit, *, is_whole: bool = False) -> Answer:
        """An answer that has begun; its caller ends it with `cancel`.

        Args:
            is_whole: nobody reads it piece by piece, so that the event loop is woken by its end alone; a wake-up for
                each token took a millisecond of an answer of 24.

        Raises:
            ApiError: whatever keeps it from beginning.
        """
        answer = self._submit(prompt, decoding, visit, is_whole)
        try:
            await answer.first()
        except BaseException:
            answer.cancel()
            raise
        return answer

    async def text(self, prompt: Prompt, decoding: Decoding, visit: Visit) -> tuple[str, Ended]:
        """A whole answer, and what it took.

        Raises:
            ApiError: it did not begin, or did not end well.
        """
        answer = await self.begin(prompt, decoding, visit, is_whole=True)
        try:
            text = "".join([piece async for piece in answer.pieces()])
        finally:
            answer.cancel()
        assert answer.ended is not None
        return text, answer.ended

    async def prepare(self, question: Question, decoding: Decoding) -> Prompt:
        """Decode the question's pictures and encode its chat.

        Raises:
            ApiError: bad input, no room, or no engine.
        """
        engine, started_s = self._ready(), time.monotonic()
        limits = self.settings.limits
        if len(question.pictures) > limits.max_images:
            text = f"{len(question.pictures)} pictures; at most {limits.max_images} are read in one request"
            raise invalid(text, question.param)
        try:
            query = Query(await self._files(question), question.turns, question.places)
            pixels, num_bytes = await self._look(engine, query)
            if num_bytes > self.pictures.num_bytes:
                text = f"to decode the pictures takes {num_bytes / MEGABYTE:.0f} MB: shrink them"
                raise ApiError(413, text, code="image_too_large", param=question.picture_param)
            async with AsyncExitStack() as held:
                if num_bytes:
                    await held.enter_async_context(self._room(num_bytes))
                prompt = await self.in_thread(partial(engine.prepare, query, decoding, pixels))
        except InputError as error:
            raise of_input_error(error, question) from error
        self.metrics.prepared(time.monotonic() - started_s)
        return prompt

    async def _files(self, question: Question) -> tuple[ImageFile, ...]:
        """The pictures' files, of which none is decoded yet."""
        if not self.settings.limits.fetches and any(isinstance(picture, str) for picture in question.pictures):
            text = "pictures are not fetched from addresses here: send a data: URL"
            raise invalid(text, question.picture_param, "image_url")
        files = [
            await self._in(self._fetchers, partial(fetch, picture)) if isinstance(picture, str) else picture
            for picture in question.pictures
        ]
        return tuple(map(ImageFile, files))

    async def _look(self, engine: Engine, query: Query) -> tuple[Pixels | None, int]:
        """What is known of the query's pictures; else the memory that they will take."""
        look = partial(_known_or_measured, engine, query, self.settings.limits.max_pixels)
        num_bytes = sum(len(image.content) for image in query.images if isinstance(image, ImageFile))
        return look() if num_bytes <= INLINE_BYTES else await self.in_thread(look)

    @asynccontextmanager
    async def _room(self, num_bytes: int) -> AsyncIterator[None]:
        async with AsyncExitStack() as held:
            try:
                await held.enter_async_context(self.pictures.taken(num_bytes, self.settings.times.queue_s))
            except asyncio.TimeoutError:
                text = "many large pictures are being decoded: ask again later"
                raise ApiError(503, text, code="overloaded", retry_after_s=5, reason="pictures") from None
            yield

    def _submit(self, prompt: Prompt, decoding: Decoding, visit: Visit, is_whole: bool) -> Answer:
        assert self._bridge is not None
        engine, outbox = self._ready(), Outbox[Event]()
        kept = self.answers.find(prompt, decoding)
        if kept is not None:
            for event in kept:
                outbox.put(event)
            self.metrics.answered_again()
            self._began(visit)
            return Answer(_Nobody(), outbox, self.settings.times, visit)
        post, pieces = partial(self._bridge.post, outbox), list[str]()

        def on_event(event: Event) -> None:
            has_token = isinstance(event, Piece) or (isinstance(event, Ended) and event.tokens > 0)
            if has_token and not pieces:
                self._began(visit)
            if isinstance(event, Piece):
                pieces.append(event.text)
                if is_whole:
                    return
            elif is_whole and isinstance(event, Ended):
                post(Piece("".join(pieces)))
            post(event)
            if isinstance(event, Ended):
                self._count(event)
                if event.reason != "cancelled":
                    again = replace(event, queue_s=0.0, prefill_s=0.0, decode_s=0.0)
                    self.answers.keep(prompt, decoding, (Piece("".join(pieces)), again))

        try:
            request = engine.submit(prompt, decoding, on_event)
        except Refused as error:
            raise refusal(error) from None
        return Answer(request, outbox, self.settings.times, visit)

    def _ready(self) -> Engine:
        if self.engine is None:
            raise ApiError(503, "the model is being loaded: ask again soon", code="loading", retry_after_s=5)
        if self.engine.state == "draining":
            raise refusal(Draining("the server is closing: ask again in a minute", 30.0))
        if self.engine.state == "dead":
            raise refusal(EngineDead(self.engine.why, 60.0))
        return self.engine

    def after_step(self) -> None:
        """Pass on what a step of the engine has said; called in its thread."""
        if self._bridge is not None:
            self._bridge.flush()

    def _began(self, visit: Visit) -> None:
        self.metrics.began(time.monotonic() - visit.started_s)

    def _count(self, event: Ended) -> None:
        self.metrics.ended(
            reason=event.reason,
            prompt_tokens=event.prompt_tokens,
            tokens=event.tokens,
            seconds=(event.queue_s, event.prefill_s, event.decode_s),
        )

    def _gauges(self) -> Values:
        found = {
            "picture_bytes_in_use": ("Promised to pictures that are being decoded", float(self.pictures.num_taken)),
            "body_bytes_in_use": ("Promised to bodies that are not small", float(self.bodies.budget.num_taken)),
        }
        if self.engine is not None:
            found |= engine_gauges(self.engine.stats())
        return found

    def _counters(self) -> Values:
        return engine_counters(self.engine.stats()) if self.engine is not None else {}


class _Nobody:
    """Instead of the engine's request, where an answer was there already."""

    num_tokens = 0

    def cancel(self) -> None:
        """Nothing goes on."""


def _known_or_measured(engine: Engine, query: Query, max_pixels: int) -> tuple[Pixels | None, int]:
    pixels = engine.find_pixels(query)
    return (pixels, 0) if pixels is not None else (None, decoding_bytes(query, max_pixels))
