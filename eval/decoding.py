"""Decoding: the choice of each next token, and the tokens' text.

Owns: `Decoding` (what a caller asks for), `choose_tokens` (logits -> token ids), `AnswerText` (token ids -> text, with
end tokens and stop strings) and `AnswerStream` (text as it comes). Does not own the model or its cache.

Shapes: B rows, S of them sampled, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from models.common.errors import InputError

EndReason = Literal["stop", "length", "cancelled"]
"""Why an answer ended: an end token or a stop string, as many tokens as asked for or as fit, or nobody waits for it."""

_INCOMPLETE = "\ufffd"
"""The character that a byte-level tokenizer returns for an incomplete one."""


@dataclass(frozen=True)
class Decoding:
    """How answers are decoded. It is complete: of a model's generation config only the end tokens are used.

    `temperature` 0 is greedy. `top_p` keeps the smallest set of tokens whose probability reaches it (Holtzman et al.,
    2020). The same `seed` gives the same answer to the same query, alone or in any batch. Each of `stop` ends the
    answer and is cut from it. With `speculate` a model with heads for future tokens decodes a greedy answer to one
    query several tokens per forward (`auto`: while that is faster); the answer is the same. Raises InputError for
    invalid values.
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


def choose_tokens(
    logits_BV: torch.Tensor, decodings: Sequence[Decoding], generators: Sequence[torch.Generator]
) -> torch.Tensor:
    """The next token of each row, ids_B, by the row's own decoding; `logits_BV` may have any float type.

    A row draws once a token, from a generator of its own, so that neither the other rows of a batch nor any other user
    of PyTorch's global random state changes an answer. Sampling is the exponential race: argmax of p / Exp(1).
    """
    ids_B = logits_BV.argmax(dim=-1)
    sampled = [row for row, decoding in enumerate(decodings) if decoding.temperature > 0]
    if not sampled:
        return ids_B
    rows_S = torch.tensor(sampled, device=logits_BV.device)
    asked = [decodings[row] for row in sampled]
    temperatures_S1 = torch.tensor([each.temperature for each in asked], device=logits_BV.device)[:, None]
    probabilities_SV = (logits_BV[rows_S].float() / temperatures_S1).softmax(dim=-1)
    if any(each.top_p < 1 for each in asked):
        probabilities_SV = _nucleus(probabilities_SV, [each.top_p for each in asked])
    races_SV = torch.empty_like(probabilities_SV)
    for race_V, row in zip(races_SV, sampled, strict=True):
        race_V.exponential_(generator=generators[row])
    return ids_B.index_copy(0, rows_S, (probabilities_SV / races_SV).argmax(dim=-1))


def _nucleus(probabilities_SV: torch.Tensor, top_ps: Sequence[float]) -> torch.Tensor:
    """Probabilities with 0 outside of the smallest set that reaches a row's `top_p`; the most likely always stays."""
    sorted_SV, order_SV = probabilities_SV.sort(dim=-1, descending=True)
    before_SV = sorted_SV.cumsum(dim=-1) - sorted_SV
    # Rounding may take a sum beyond 1 before the last token: a row without a nucleus keeps all of them.
    limits = [top_p if top_p < 1 else float("inf") for top_p in top_ps]
    sorted_SV = sorted_SV.masked_fill(before_SV >= torch.tensor(limits, device=before_SV.device)[:, None], 0.0)
    return torch.zeros_like(probabilities_SV).scatter(-1, order_SV, sorted_SV)


def end_ids_of(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end an answer, by the generation config or the tokenizer.

    Raises:
        InputError: neither names any.
    """
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if configured is None:
        configured = tokenizer.eos_token_id
    ids = frozenset([configured] if isinstance(configured, int) else configured or [])
    if not ids:
        raise InputError("neither the generation config nor the tokenizer names an end token: set eos_token_id")
    return ids


class AnswerText:
    """The text of one answer as its tokens arrive.

    `push` returns the text that is certain by now, so joined pieces are the answer: half a character, trailing white
    space and a possible start of a stop string are held back until more tokens arrive. White space around an answer is
    cut.
    """

    def __init__(self, tokenizer: Any, *, end_ids: frozenset[int], max_tokens: int, stop: tuple[str, ...]) -> None:
        self.ids: list[int] = []
        """All tokens of the answer, its end token included."""
        self.done = max_tokens <= 0
        self.reason: EndReason = "length"
        """Why it ended, once it is `done`."""
        self.max_tokens = max_tokens
        self._tokenizer = tokenizer
        self._end_ids, self._stop = end_ids, stop
        self._raw = ""
        self._num_emitted = 0
        self._context, self._read = 0, 0  # ids before _read are in _raw; decoding starts at _context for its spaces

    def push(self, token_id: int) -> str:
        """Take one more token and return the text that it makes certain; empty after the answer has ended."""
        if self.done:
            return ""
        self.ids.append(token_id)
        is_end = token_id in self._end_ids
        ended = is_end or len(self.ids) >= self.max_tokens
        self._decode(flush=ended)
        cut = min((at for stop in self._stop if (at := self._raw.find(stop)) >= 0), default=None)
        if cut is not None:
            self._raw = self._raw[:cut]
        self.done = ended or cut is not None
        self.reason = "stop" if is_end or cut is not None else "length"
        return self._emit()

    def finish(self) -> str:
        """End the answer where it is, since nobody wants the rest, and return what was held back."""
        if self.done:
            return ""
        self._decode(flush=True)
        self.done, self.reason = True, "cancelled"
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
        """Length of the longest suffix of `_raw` that is a prefix of a stop string."""
        lengths = (length for stop in self._stop for length in range(1, len(stop)) if self._raw.endswith(stop[:length]))
        return max(lengths, default=0)


class AnswerStream(Iterator[str]):
    """The pieces of one answer as they arrive, and their speed. Empty pieces are left out.

    Args:
        pieces: the text of each new token, or of several.
        count: how many tokens there are so far, the end token included.
    """

    def __init__(self, pieces: Iterator[str], count: Callable[[], int]) -> None:
        self._pieces, self._count = pieces, count
        self._started_s = time.perf_counter()
        self.first_token_s: float | None = None
        """Seconds from the call to the first token: images, prompt and one choice."""
        self.seconds = 0.0

    def __next__(self) -> str:
        for piece in self._pieces:
            self.seconds = time.perf_counter() - self._started_s
            if self.first_token_s is None:
                self.first_token_s = self.seconds
            if piece:
                return piece
        raise StopIteration

    @property
    def num_tokens(self) -> int:
        """Tokens written so far, the end token included."""
        return self._count()

    @property
    def tokens_per_s(self) -> float | None:
        """Decoding speed after the first token; None while there are fewer than two."""
        if self.first_token_s is None or self.num_tokens < 2 or self.seconds <= self.first_token_s:
            return None
        return (self.num_tokens - 1) / (self.seconds - self.first_token_s)
