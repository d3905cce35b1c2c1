"""What the page asks: the engine that the API asks too, in the manner of `Predictor.stream`.

Runs in the page's threads. Pictures take from the same budget as the API's.
"""

from __future__ import annotations

import queue
from collections.abc import Iterator
from concurrent.futures import TimeoutError as FutureTimeoutError

from eval.decoding import AnswerStream, Decoding
from eval.engine import Ended, Engine, Event, Piece, Refused, Request
from eval.query import Query
from models.common.errors import InputError
from tools.serve.budget import Budget, decoding_bytes
from tools.serve.chat import Cancel

CLOSING = "the page is closing, and this answer ends here"


class EngineAsker:
    """Asks an engine for the page.

    Args:
        engine: serves already.
        pictures: the bytes that decoding shares.
        wait_s: how long a picture waits for its part of them.
    """

    def __init__(self, engine: Engine, pictures: Budget, wait_s: float) -> None:
        self._engine, self._pictures, self._wait_s = engine, pictures, wait_s

    def stream(self, query: Query, decoding: Decoding, *, cancel: Cancel) -> AnswerStream:
        """Answer one query piece by piece. `cancel` ends it, and is told where the server ends it.

        Raises:
            InputError: the query cannot be asked, or not now.
        """
        pixels = self._engine.find_pixels(query)
        num_bytes = 0 if pixels is not None else min(decoding_bytes(query), self._pictures.num_bytes)
        try:
            with self._pictures.taken_by_thread(num_bytes, self._wait_s):
                prompt = self._engine.prepare(query, decoding, pixels)
        except (TimeoutError, FutureTimeoutError):
            raise InputError("many large images are being decoded: ask again later") from None
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        try:
            request = self._engine.submit(prompt, decoding, events.put, cancel=cancel)
        except Refused as error:
            raise InputError(str(error)) from None
        return AnswerStream(_pieces(request, events, cancel), lambda: request.num_tokens)


def _pieces(request: Request, events: queue.SimpleQueue[Event], cancel: Cancel) -> Iterator[str]:
    try:
        while not isinstance(event := events.get(), Ended):
            if isinstance(event, Piece):
                yield event.text
            elif isinstance(event.error, Refused):
                cancel.end(CLOSING)
                return
            else:
                raise event.error
    except BaseException:  # nobody reads on; behind its end an answer is not cancelled, for `cancel` is its caller's
        request.cancel()
        raise
