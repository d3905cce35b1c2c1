"""A cache of answers: the same query with the same decoding gets the same answer, whatever else is in the batch.

Owns the most recent answers and the equality of queries: every token, every pixel and the decoding count.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from dataclasses import replace
from typing import Generic, TypeVar

from eval.decoding import Decoding
from eval.prompts import Prompt

Value = TypeVar("Value")


class AnswerCache(Generic[Value]):
    """The last `num_answers` answers by query. Safe to use from several threads; 0 keeps none."""

    def __init__(self, num_answers: int) -> None:
        self._num_answers = num_answers
        self._answers: OrderedDict[bytes, Value] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, prompt: Prompt, decoding: Decoding) -> Value | None:
        """The cached answer to this prompt and decoding, which then counts as just used; None where there is none."""
        if not self._num_answers:
            return None
        key = _key(prompt, decoding)
        with self._lock:
            if key in self._answers:
                self._answers.move_to_end(key)
            return self._answers.get(key)

    def keep(self, prompt: Prompt, decoding: Decoding, answer: Value) -> None:
        """Store an answer; beyond the limit the least recently used one is removed."""
        if not self._num_answers:
            return
        with self._lock:
            self._answers[_key(prompt, decoding)] = answer
            while len(self._answers) > self._num_answers:
                self._answers.popitem(last=False)


def _key(prompt: Prompt, decoding: Decoding) -> bytes:
    """Every token, every pixel by its image's digest, and the decoding, of which a greedy one needs no seed."""
    if decoding.temperature == 0:
        decoding = replace(decoding, seed=0)
    return hashlib.sha256(repr((decoding, prompt.ids, prompt.pixels.digests)).encode()).digest()
