"""One question on the page: from the page's fields to a query, and from the model's output to the page.

Owns the state of one visitor's chat and showing errors on the page. Does not import Gradio, so that it can be tested
without it.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from eval.predictor import AnswerStream, Decoding, Query, Turn
from eval.query import ImageFile
from models.common.errors import InputError

MAX_QUESTION_CHARACTERS = 4000
SAID_NOTHING = "the model ended its answer without a word: ask in other words, or try again"
UPDATE_INTERVAL_S = 0.04
"""Interval of updates of the page, in seconds; faster ones would not be visible."""


@dataclass(frozen=True)
class Chat:
    """One visitor's chat: the image's file, and the turns so far. `num_retries` seeds the next sampled answer."""

    image: str | None = None
    turns: tuple[Turn, ...] = ()
    num_retries: int = 0

    def asked(self, image: str | None, question: str) -> Chat:
        """This chat with one more question; another image begins a new one."""
        question = question.strip()
        if not question:
            raise InputError("there is no question yet: write one")
        if len(question) > MAX_QUESTION_CHARACTERS:
            raise InputError(f"the question has {len(question)} characters: {MAX_QUESTION_CHARACTERS} are read")
        earlier = self.turns if image == self.image else ()
        return Chat(image, (*earlier, Turn("user", question)))

    def again(self) -> Chat:
        """The chat before its last answer, so that it can be asked again."""
        turns = self.turns[:-1] if self.turns and self.turns[-1].role == "assistant" else self.turns
        if not turns:
            raise InputError("there is no answer yet to be tried again")
        return replace(self, turns=turns, num_retries=self.num_retries + 1)

    def answered(self, text: str) -> Chat:
        """This chat, which ends with a question, with `text` as the answer so far."""
        return replace(self, turns=(*self.turns, Turn("assistant", text)))


@dataclass(frozen=True)
class Update:
    """An update of the page. `error` is one line; `speed` and `tokens_per_s` are there when the answer has ended."""

    chat: Chat
    error: str = ""
    speed: str = ""
    tokens_per_s: float | None = None


class Cancel(threading.Event):
    """Ends an answer, and says why."""

    reason = ""
    is_dropped = False
    """Whether what was written is not wanted either."""

    def drop(self) -> None:
        """End it after the next token, and take away what was written. May be called from any thread."""
        self.is_dropped = True
        self.set()

    def end(self, reason: str) -> None:
        """End it after the next token; only the first reason counts. May be called from any thread."""
        self.reason = self.reason or reason
        self.set()


@contextmanager
def time_limit(cancel: Cancel, seconds: float) -> Iterator[None]:
    """End an answer that takes longer."""
    timer = threading.Timer(seconds, cancel.end, [f"the answer took longer than {seconds:g} s and ends here"])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class Asker(Protocol):
    """What answers: the engine, or a predictor alone."""

    def stream(self, query: Query, decoding: Decoding, *, cancel: Cancel) -> AnswerStream:
        """Answer one query piece by piece."""
        ...


def reply(asker: Asker, chat: Chat, decoding: Decoding, cancel: Cancel | None = None) -> Iterator[Update]:
    """Answer the chat's last question, piece by piece. Never raises: what goes wrong becomes an update.

    A question that could not be answered is not kept: with it, the chat could go on no more.
    """
    text, cancel = "", cancel or Cancel()
    try:
        images = (ImageFile.read(Path(chat.image)),) if chat.image else ()
        yield Update(chat.answered(""))
        query, decoding = Query(images, chat.turns), replace(decoding, seed=chat.num_retries)
        stream = asker.stream(query, decoding, cancel=cancel)
        shown_s = 0.0
        for piece in stream:
            text += piece
            if time.monotonic() - shown_s >= UPDATE_INTERVAL_S:
                shown_s = time.monotonic()
                yield Update(chat.answered(text))
        if not text and cancel.is_set():
            raise InputError(cancel.reason)
        told = cancel.reason if text else SAID_NOTHING
        yield Update(chat.answered(text), told, describe_speed(stream), stream.tokens_per_s)
    except Exception as error:
        yield Update(replace(chat, turns=chat.turns[:-1]), error=describe_error(error))


def describe_error(error: Exception) -> str:
    """One line for the page. A bug of ours leaves its traceback in the server's log."""
    if isinstance(error, InputError):
        return str(error)
    if type(error).__name__ == "OutOfMemoryError":
        return "the GPU has not enough memory for this: take fewer beams or a shorter chat"
    traceback.print_exception(error, file=sys.stderr)
    return f"something went wrong here ({type(error).__name__}); the server's log says more"


def describe_speed(stream: AnswerStream) -> str:
    """How fast an answer came, for the line under the chat."""
    parts = [f"{stream.num_tokens} token{'' if stream.num_tokens == 1 else 's'}"]
    if stream.first_token_s is not None:
        parts.append(f"first after {stream.first_token_s:.2f} s")
    if stream.tokens_per_s is not None:
        parts.append(f"{stream.tokens_per_s:.1f} tokens/s")
    return " · ".join(parts)
