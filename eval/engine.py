"""Many callers, one model: the only thread that touches the model and its caches.

    any thread:  prepare --> Prompt --submit--> WaitingLine --.
                                                              v
    the engine's thread:  drop cancelled -> admit newcomers -> join -> step -> leave;  events --> on_event

Owns what callers see: preparing, asking, streams, statistics, and the end. Does not own the thread's work
(`eval.engine_loop`), nor the queue (`eval.waiting`).
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from eval.batch import Row
from eval.decoding import AnswerStream, Decoding
from eval.engine_loop import EngineLoop, position_bytes
from eval.lru_cache import LruCache
from eval.pixels import Pixels
from eval.predictor import Predictor
from eval.prompts import Prompt, PromptTooLongError
from eval.query import ImageFile, Query
from eval.requests import (
    CacheStats,
    Draining,
    Ended,
    EngineDead,
    EngineLimits,
    EngineStats,
    Event,
    Failed,
    Piece,
    QueueFull,
    Refused,
    Request,
    State,
)
from eval.waiting import WaitingLine
from models.common.memory import free_bytes
from models.common.threads import WaitedThread

__all__ = [
    "Draining",
    "Ended",
    "Engine",
    "EngineDead",
    "EngineLimits",
    "EngineStats",
    "Event",
    "Failed",
    "Piece",
    "QueueFull",
    "Refused",
    "Request",
]


LIMITS = EngineLimits()


class Engine:
    """Answers the requests of many threads with one predictor, whose model nobody else may use meanwhile.

    `start` comes before all else.

    Args:
        after_step: called in the engine's thread after the events of a step, so that a caller can pass them on at once.
    """

    def __init__(
        self,
        predictor: Predictor,
        limits: EngineLimits = LIMITS,
        *,
        after_step: Callable[[], None] = lambda: None,
    ) -> None:
        self.predictor, self.limits = predictor, limits
        self._after_step = after_step
        self._line = WaitingLine(limits.waiting)
        self._pixels: LruCache[tuple[bytes, ...], Pixels] = LruCache(limits.pixel_bytes)
        self._position_bytes = self._total_positions = 0
        self._loop: EngineLoop | None = None
        self._thread: WaitedThread | None = None

    @property
    def state(self) -> State:
        """Loading, serving, draining, or dead."""
        return self._line.state

    @property
    def why(self) -> str:
        """Why it takes nothing any more, once it is dead."""
        return self._line.why

    def start(self) -> Engine:
        """Measure a token's keys and values, and begin to answer."""
        assert self._thread is None, "it was started before"
        total_bytes = self.limits.cache_bytes
        if total_bytes is None:
            total_bytes = free_bytes(self.predictor.device) // 4
        self._position_bytes = position_bytes(self.predictor)
        self._total_positions = total_bytes // self._position_bytes
        self._loop = EngineLoop(
            self.predictor,
            self.limits,
            self._line,
            total_positions=self._total_positions,
            after_step=self._after_step,
        )
        self._thread = WaitedThread(self._loop.run, name="engine", is_daemon=True)
        self._thread.start()
        return self

    def find_pixels(self, query: Query) -> Pixels | None:
        """What was kept of the query's images, if all are files that were asked about lately; for any thread."""
        key = _digests(query)
        return self._pixels.find(key) if key else None

    def prepare(self, query: Query, decoding: Decoding, pixels: Pixels | None = None) -> Prompt:
        """Encode a query for `submit`, without the model; for any thread.

        Args:
            pixels: those that `find_pixels` has found for it.

        Raises:
            InputError: an image or a text beyond the limits, or no room for an answer.
        """
        prompt = self.predictor.prompt(query, pixels)
        self._row(prompt, decoding, threading.Event())
        _ = prompt.pixels.digests  # computed here, for it takes milliseconds that the engine's thread can use better
        if pixels is None and (key := _digests(query)):
            self._pixels.keep(key, prompt.pixels, prompt.pixels.num_bytes)
        return prompt

    def submit(
        self,
        prompt: Prompt,
        decoding: Decoding,
        on_event: Callable[[Event], None],
        stop: Sequence[str] = (),
        seed: int | None = None,
        *,
        cancel: threading.Event | None = None,
    ) -> Request:
        """Ask for an answer; from any thread. `on_event` is called in the engine's thread, and must not block.

        It gets any number of `Piece`s, then one `Ended` or `Failed`.

        Args:
            stop: further strings that end the answer.
            seed: instead of the decoding's.
            cancel: ends the answer when it is set, as `Request.cancel` does.

        Raises:
            QueueFull: too many wait.
            Draining: the engine takes nothing new.
            EngineDead: the engine takes nothing any more.
            InputError: no room for an answer.
        """
        seed = decoding.seed if seed is None else seed
        decoding = replace(decoding, stop=(*decoding.stop, *stop), seed=seed)
        request = Request(self._row(prompt, decoding, cancel or threading.Event()), on_event)
        self._line.add(request)
        return request

    def stream(self, query: Query, decoding: Decoding, *, cancel: threading.Event | None = None) -> AnswerStream:
        """Answer one query piece by piece, as `Predictor.stream` does, in a batch with everybody else's.

        Raises as `submit`, and when the answer fails.
        """
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        request = self.submit(self.prepare(query, decoding), decoding, events.put, cancel=cancel)
        return AnswerStream(_pieces(events, request), lambda: request.num_tokens)

    def drain(self, grace_s: float) -> bool:
        """Take nothing new, and wait until all that was taken has ended; returns whether it has within `grace_s`."""
        return self._line.drain(grace_s, self._is_busy)

    def close(self) -> None:
        """End the thread after its step. What has not ended fails, and can be asked again elsewhere."""
        self._line.close()
        if self._thread is not None:
            self._thread.wait()
        self._pixels.clear()

    def _is_busy(self) -> bool:
        return self._loop is not None and bool(self._loop.running)

    def stats(self) -> EngineStats:
        """Counters since the start."""
        assert self._loop is not None, "`start` comes first"
        loop = self._loop
        counts = loop.batch.counts
        return EngineStats(
            running=len(loop.running),
            waiting=len(self._line),
            cache_bytes_promised=loop.promised_positions() * self._position_bytes,
            cache_bytes_total=self._total_positions * self._position_bytes,
            prompt_tokens=loop.num_prompt_tokens,
            tokens=loop.num_tokens,
            finished=dict(loop.finished),
            rejected=self._line.rejected(),
            steps=counts.steps,
            row_steps=counts.rows,
            padding_share=1 - counts.tokens / counts.columns if counts.columns else 0.0,
            pixels=CacheStats.of(self._pixels),
            features=CacheStats.of(loop.reader.features),
            chats=CacheStats.of(loop.reader.chats),
        )

    def _row(self, prompt: Prompt, decoding: Decoding, cancel: threading.Event) -> Row:
        """A row that fits into the cache by itself; a longer answer is cut to what fits."""
        row = self.predictor.row(prompt, decoding, cancel=cancel)
        room = self._total_positions // decoding.num_beams - len(prompt.ids)
        if room < 1:
            raise PromptTooLongError(
                f"the chat takes {len(prompt.ids)} tokens, more than the memory for keys and values has room for: "
                "shorten it"
            )
        row.text.max_tokens = min(row.text.max_tokens, room)
        return row


def _digests(query: Query) -> tuple[bytes, ...]:
    """By what a query's images are told from others; empty where it has none, or some that are no files."""
    files = [image for image in query.images if isinstance(image, ImageFile)]
    return tuple(file.digest for file in files) if len(files) == len(query.images) else ()


def _pieces(events: queue.SimpleQueue[Event], request: Request) -> Iterator[str]:
    try:
        while True:
            event = events.get()
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Ended):
                return
            yield event.text
    except BaseException:  # nobody reads on; behind its end an answer is not cancelled, for the event is its caller's
        request.cancel()
        raise
