"""What happens when a person asks: from the page's fields to a query, and from the model's pieces to the page.

Owns the state of one visitor's chat and every error's way onto the page. Knows nothing of Gradio, so that it can be
read and tested without it.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from data_pipeline.images import open_picture
from eval.predictor import AnswerStream, Decoding, Predictor, Query, Turn
from models.errors import InputError

MAX_QUESTION_CHARACTERS = 4000
UPDATE_INTERVAL_S = 0.04
"""How often the page is told of new text; more often than a screen shows is wasted."""


@dataclass(frozen=True)
class Chat:
    """One visitor's chat: the picture's file, and the turns so far. `num_retries` seeds the next sampled answer."""

    picture: str | None = None
    turns: tuple[Turn, ...] = ()
    num_retries: int = 0

    def asked(self, picture: str | None, question: str) -> Chat:
        """This chat with one more question; another picture begins a new one."""
        question = question.strip()
        if not question:
            raise InputError("there is no question yet: write one")
        if len(question) > MAX_QUESTION_CHARACTERS:
            raise InputError(f"the question has {len(question)} characters: {MAX_QUESTION_CHARACTERS} are read")
        earlier = self.turns if picture == self.picture else ()
        return Chat(picture, (*earlier, Turn("user", question)))

    def again(self) -> Chat:
        """This chat before its last answer."""
        turns = self.turns[:-1] if self.turns and self.turns[-1].role == "assistant" else self.turns
        if not turns:
            raise InputError("there is no answer yet to be tried again")
        return replace(self, turns=turns, num_retries=self.num_retries + 1)

    def answered(self, text: str) -> Chat:
        """This chat, which ends with a question, with `text` as the answer so far."""
        return replace(self, turns=(*self.turns, Turn("assistant", text)))


@dataclass(frozen=True)
class Update:
    """What the page shows now. `error` is one line; `speed` and `tokens_per_s` are there when the answer has ended."""

    chat: Chat
    error: str = ""
    speed: str = ""
    tokens_per_s: float | None = None


def reply(predictor: Predictor, chat: Chat, decoding: Decoding) -> Iterator[Update]:
    """Answer the chat's last question, piece by piece. Never raises: what goes wrong becomes an update."""
    text = ""
    try:
        pictures = (open_picture(Path(chat.picture)),) if chat.picture else ()
        yield Update(chat.answered(""))
        stream = predictor.stream(Query(pictures, chat.turns), replace(decoding, seed=chat.num_retries))
        shown_s = 0.0
        for piece in stream:
            text += piece
            if time.monotonic() - shown_s >= UPDATE_INTERVAL_S:
                shown_s = time.monotonic()
                yield Update(chat.answered(text))
        yield Update(chat.answered(text), speed=describe_speed(stream), tokens_per_s=stream.tokens_per_s)
    except Exception as error:
        yield Update(chat.answered(text), error=describe_error(error))


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
