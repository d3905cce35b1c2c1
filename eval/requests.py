"""What the engine and its callers tell each other: limits, events, refusals, and what has happened so far.

Values alone; the engine is `eval.engine`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from eval.batch import Row
from eval.decoding import EndReason

State = Literal["loading", "serving", "draining", "dead"]
"""Before the first answer, taking requests, ending those that were taken, and done with all."""


@dataclass(frozen=True)
class EngineLimits:
    """How much an engine takes on at once."""

    rows: int = 16
    """Answers that are written together."""
    waiting: int = 64
    """Requests that wait for a row; more are refused."""
    newcomers: int = 4
    """Prompts that are read between two tokens of the running rows; where none run, all that wait."""
    newcomer_tokens: int = 2048
    """Tokens of these prompts, padding included; a longer prompt is read alone."""
    cache_bytes: int | None = None
    """Keys and values that are promised to running rows; None is a quarter of the memory that is free at the start."""
    feature_bytes: int = 1 << 28
    """Projected features of images that are kept."""
    chat_bytes: int = 1 << 28
    """Keys and values of chats that are kept for a further turn."""
    pixel_bytes: int = 1 << 28
    """Pixels of images, as the processor makes them, that are kept for another question about the same files."""


@dataclass(frozen=True)
class Piece:
    """More of the answer's text."""

    text: str


@dataclass(frozen=True)
class Ended:
    """The last event of an answer. Seconds: waiting for a row, to the first token, from it to the last."""

    reason: EndReason
    prompt_tokens: int
    tokens: int
    queue_s: float
    prefill_s: float
    decode_s: float


@dataclass(frozen=True)
class Failed:
    """The last event of an answer that cannot be finished; `retry_after_s` where the same request may succeed later."""

    error: Exception
    retry_after_s: float | None = None


Event = Piece | Ended | Failed


class Refused(Exception):  # noqa: N818 - a refusal is what it is
    """A request that the engine does not take. `reason` is one word, for counters."""

    reason = "refused"

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueFull(Refused):
    """As many requests wait as may."""

    reason = "queue_full"


class Draining(Refused):
    """The engine ends what it has, and takes nothing new."""

    reason = "draining"


class EngineDead(Refused):
    """The engine has failed too often, or is closed."""

    reason = "dead"


class Request:
    """A request from its arrival to its last event. Only the engine's thread tells it what happens."""

    def __init__(self, row: Row, on_event: Callable[[Event], None]) -> None:
        self.row, self._on_event = row, on_event
        self._submitted_s = time.perf_counter()
        self._admitted_s = self._first_token_s = 0.0

    def cancel(self) -> None:
        """End the answer before its next token. Its last event is then an `Ended` all the same. From any thread."""
        self.row.cancel.set()

    @property
    def cancelled(self) -> threading.Event:
        """Set once nobody waits for the answer."""
        return self.row.cancel

    @property
    def num_tokens(self) -> int:
        """Tokens written so far."""
        return len(self.row.text.ids)

    def admitted(self) -> None:
        """It has left the queue."""
        self._admitted_s = time.perf_counter()

    def piece(self, text: str) -> None:
        """A token was written, with the text that it makes certain."""
        self._first_token_s = self._first_token_s or time.perf_counter()
        if text:
            self._on_event(Piece(text))

    def end(self) -> None:
        """The answer has ended, or nobody waits for it."""
        self.piece(self.row.text.finish())
        now_s = time.perf_counter()
        admitted_s = self._admitted_s or now_s
        first_s = self._first_token_s if self.num_tokens else now_s
        self._on_event(
            Ended(
                reason=self.row.text.reason,
                prompt_tokens=len(self.row.prompt.ids),
                tokens=self.num_tokens,
                queue_s=admitted_s - self._submitted_s,
                prefill_s=max(first_s - admitted_s, 0.0),
                decode_s=now_s - first_s,
            )
        )

    def fail(self, error: Exception, retry_after_s: float | None = None) -> None:
        """The answer cannot be finished."""
        self._on_event(Failed(error, retry_after_s))


class Cache(Protocol):
    """What keeps values and counts who asks for them."""

    num_queries: int
    num_hits: int
    num_bytes: int


@dataclass(frozen=True)
class CacheStats:
    """What is kept of one kind, how often it was looked for, and how often it was there."""

    num_queries: int = 0
    num_hits: int = 0
    num_bytes: int = 0

    @classmethod
    def of(cls, cache: Cache | None) -> CacheStats:
        """The counters of this moment; 0 where nothing is kept."""
        return cls() if cache is None else cls(cache.num_queries, cache.num_hits, cache.num_bytes)


@dataclass(frozen=True)
class EngineStats:
    """What an engine has done since its start, and what it is doing. Reads may be one step old."""

    running: int
    waiting: int
    cache_bytes_promised: int
    cache_bytes_total: int
    prompt_tokens: int
    tokens: int
    finished: Mapping[str, int]
    """Answers by the reason of their end, and `failed`."""
    rejected: Mapping[str, int]
    """Requests that were not taken, by reason."""
    steps: int
    row_steps: int
    padding_share: float
    """Of the positions that steps computed with."""
    pixels: CacheStats
    """Of the images of whole chats."""
    features: CacheStats
    """Of single images."""
    chats: CacheStats

    @property
    def rows_per_step(self) -> float:
        """Rows that a step gave a token to, on average."""
        return self.row_steps / self.steps if self.steps else 0.0

    @property
    def kept_bytes(self) -> int:
        """Of pixels, features and chats."""
        return self.pixels.num_bytes + self.features.num_bytes + self.chats.num_bytes

    @property
    def cancelled(self) -> int:
        """Answers that nobody waited for to the end."""
        return self.finished["cancelled"]
