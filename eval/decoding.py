"""How an answer is written: the choice of each next token, and the text that the tokens make.

Owns: `Decoding` (what a caller asks for), `Chooser` (logits -> token ids) and `AnswerText` (token ids -> text, with
end tokens and stop strings) and `AnswerStream` (text as it comes). Does not own the model or its cache.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from models.errors import InputError

_INCOMPLETE = "\ufffd"
"""What a byte-level tokenizer decodes half a character to."""


@dataclass(frozen=True)
class Decoding:
    """How answers are decoded. It is complete: of a model's generation config only the end tokens are used.

    `temperature` 0 is greedy. `top_p` keeps the smallest set of tokens whose probability reaches it (Holtzman et al.,
    2020). The same `seed` gives the same answer to the same query, alone or in any batch. Each of `stop` ends the
    answer and is cut from it. By `speculate` a greedy answer to one query by a model with heads for future tokens comes
    several tokens a forward: `auto` for as long as that is faster; it stays the same answer. Raises InputError for
    values that mean nothing.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    num_beams: int = 1
    seed: int = 0
    stop: tuple[str, ...] = ()
    speculate: Literal["never", "auto", "always"] = "auto"

    def __post_init__(self) -> None:
        checks = {
            f"max_new_tokens is {self.max_new_tokens}: ask for at least 1": self.max_new_tokens >= 1,
            f"temperature is {self.temperature}: take 0 (greedy) or more": self.temperature >= 0,
            f"top_p is {self.top_p}: take more than 0 and at most 1": 0 < self.top_p <= 1,
            f"num_beams is {self.num_beams}: take 1 (no beams) or more": self.num_beams >= 1,
            "beams do not sample: with num_beams above 1 leave temperature at 0": self.num_beams == 1
            or self.temperature == 0,
            "a stop string is empty: leave it out": all(self.stop),
        }
        for message, holds in checks.items():
            if not holds:
                raise InputError(message)


class Chooser:
    """Chooses the next token of each row.

    Each row draws from a generator of its own, so that neither the other rows of a batch nor any other user of
    PyTorch's global random state changes an answer, and drawing for one answer disturbs nobody else.
    """

    def __init__(self, decoding: Decoding, num_rows: int, device: torch.device) -> None:
        self._decoding = decoding
        self._generators = [torch.Generator(device).manual_seed(decoding.seed) for _ in range(num_rows)]

    def __call__(self, logits_BV: torch.Tensor) -> torch.Tensor:
        """`logits_BV` of any float type -> ids_B. Sampling is the exponential race: argmax of p / Exp(1)."""
        if self._decoding.temperature == 0:
            return logits_BV.argmax(dim=-1)
        probabilities_BV = (logits_BV.float() / self._decoding.temperature).softmax(dim=-1)
        probabilities_BV = self._nucleus(probabilities_BV)
        races_BV = torch.empty_like(probabilities_BV)
        for race_V, generator in zip(races_BV, self._generators, strict=True):
            race_V.exponential_(generator=generator)
        return (probabilities_BV / races_BV).argmax(dim=-1)

    def _nucleus(self, probabilities_BV: torch.Tensor) -> torch.Tensor:
        if self._decoding.top_p == 1:
            return probabilities_BV
        sorted_BV, order_BV = probabilities_BV.sort(dim=-1, descending=True)
        before_BV = sorted_BV.cumsum(dim=-1) - sorted_BV
        sorted_BV = sorted_BV.masked_fill(before_BV >= self._decoding.top_p, 0.0)  # the first always stays
        return torch.zeros_like(probabilities_BV).scatter(-1, order_BV, sorted_BV)


class AnswerText:
    """The text of one answer while its tokens come.

    `push` returns the text that is certain by now, so joined pieces are the answer: half a character, white space at
    the end and what may become a stop string are held back until more is known. White space around an answer is cut.
    """

    def __init__(self, tokenizer: Any, *, end_ids: frozenset[int], max_tokens: int, stop: tuple[str, ...]) -> None:
        self.ids: list[int] = []
        """All tokens of the answer, its end token included."""
        self.done = max_tokens <= 0
        self._tokenizer = tokenizer
        self._end_ids, self._max_tokens, self._stop = end_ids, max_tokens, stop
        self._raw = ""
        self._num_emitted = 0
        self._context, self._read = 0, 0  # ids before _read are in _raw; decoding starts at _context for its spaces

    def push(self, token_id: int) -> str:
        """Take one more token and return the text that it makes certain; nothing after the answer has ended."""
        if self.done:
            return ""
        self.ids.append(token_id)
        ended = token_id in self._end_ids or len(self.ids) >= self._max_tokens
        self._decode(flush=ended)
        cut = min((at for stop in self._stop if (at := self._raw.find(stop)) >= 0), default=None)
        if cut is not None:
            self._raw = self._raw[:cut]
        self.done = ended or cut is not None
        return self._emit()

    def finish(self) -> str:
        """End the answer where it is, and return what was held back."""
        if self.done:
            return ""
        self._decode(flush=True)
        self.done = True
        return self._emit()

    def _decode(self, *, flush: bool) -> None:
        """Append the new tokens' text to `_raw`, in constant time a token (vLLM's incremental detokenizer)."""
        known = self._text(self.ids[self._context : self._read])
        both = self._text(self.ids[self._context :])
        if flush or (len(both) > len(known) and not both.endswith(_INCOMPLETE)):
            self._raw += both[len(known) :]
            self._context, self._read = self._read, len(self.ids)

    def _text(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _emit(self) -> str:
        start = self._num_emitted
        if start == 0:
            start = len(self._raw) - len(self._raw.lstrip())
        end = len(self._raw) if self.done else len(self._raw) - self._num_uncertain()
        end = len(self._raw[:end].rstrip())
        if end <= start:
            return ""
        self._num_emitted = end
        return self._raw[start:end]

    def _num_uncertain(self) -> int:
        """Length of the longest end of `_raw` that begins a stop string."""
        lengths = (length for stop in self._stop for length in range(1, len(stop)) if self._raw.endswith(stop[:length]))
        return max(lengths, default=0)


class AnswerStream(Iterator[str]):
    """The pieces of one answer as they come, and how fast they came. Empty pieces are left out."""

    def __init__(self, steps: Iterator[list[str]], text: AnswerText) -> None:
        self._steps, self._text = steps, text
        self._started_s = time.perf_counter()
        self.first_token_s: float | None = None
        """Seconds from the call to the first token: pictures, prompt and one choice."""
        self.seconds = 0.0

    def __next__(self) -> str:
        for (piece,) in self._steps:
            self.seconds = time.perf_counter() - self._started_s
            if self.first_token_s is None:
                self.first_token_s = self.seconds
            if piece:
                return piece
        raise StopIteration

    @property
    def num_tokens(self) -> int:
        """Tokens written so far, the end token included."""
        return len(self._text.ids)

    @property
    def tokens_per_s(self) -> float | None:
        """Speed of writing after the first token; None while there are fewer than two."""
        if self.first_token_s is None or self.num_tokens < 2 or self.seconds <= self.first_token_s:
            return None
        return (self.num_tokens - 1) / (self.seconds - self.first_token_s)
