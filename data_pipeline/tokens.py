"""Text -> token ids, segment by segment, without transformers or torch in the worker.

Owns how a piece of text continues the piece before it under each kind of tokenizer. Does not own the words
(`templates`).

A conversation is tokenized in segments, so that the prompt's ids never depend on the answer that follows it. Tokenizers
differ in what they do at the start of a segment:
- byte-level BPE (Qwen, Llama 3, SmolLM): nothing;
- SentencePiece kept as `legacy` (Llama 2, Vicuna): a space is put before the text and after every special token;
- SentencePiece with `prepend_scheme: first`: a space is put at the very start only.
A segment that continues others is therefore encoded behind a marker whose ids are then taken off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipeline.sample import TokenArray
from models.errors import InputError
from models.spec import IGNORE_INDEX, IMAGE_TOKEN

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_MARKER = "\n"
"""SentencePiece vocabularies hold a line feed as one byte token that never merges with what follows."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a conversation as text, special tokens written out; `is_target` where it is to be learnt."""

    text: str
    is_target: bool


@dataclass(frozen=True, slots=True)
class Tokens:
    """What the pipeline needs of a tokenizer; pickles without transformers."""

    backend: Tokenizer
    bos: str
    """The text every prompt begins with; empty where the tokenizer adds none."""
    eos: str
    special: frozenset[str]
    chat_template: str | None
    image_token_id: int

    @classmethod
    def of(cls, tokenizer: Any) -> Tokens:
        """Take over a transformers tokenizer.

        Raises:
            InputError: a Python-only tokenizer, or one without the image token or an end token.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise InputError(f"{type(tokenizer).__name__} has no fast version; convert it to a tokenizer.json first")
        added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
        if IMAGE_TOKEN not in added:
            raise InputError(f"the tokenizer lacks {IMAGE_TOKEN}; add it as a special token first")
        if tokenizer.eos_token is None:
            raise InputError("the tokenizer has no end-of-sequence token")
        opening = tokenizer("a")["input_ids"][:1]
        adds_bos = tokenizer.bos_token is not None and opening == [tokenizer.bos_token_id]
        return cls(
            backend=backend,
            bos=str(tokenizer.bos_token) if adds_bos else "",
            eos=str(tokenizer.eos_token),
            special=frozenset(added),
            chat_template=tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None,
            image_token_id=int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)),
        )

    def encode(self, text: str) -> list[int]:
        """Ids of a whole text; special tokens written in it count, none is added."""
        return list(self.backend.encode(text, add_special_tokens=False).ids)

    def token_id(self, text: str) -> int:
        """The id of a text that must be one token.

        Raises:
            InputError: it is not a token of this vocabulary.
        """
        found = self.backend.token_to_id(text)
        if found is None:
            raise InputError(f"the tokenizer has no token {text!r}, which this chat template needs")
        return int(found)

    def encode_segments(self, segments: Sequence[Segment]) -> tuple[TokenArray, TokenArray]:
        """Ids and labels [L] of a conversation, the image token once per picture."""
        ids: list[int] = []
        labels: list[int] = []
        previous = ""
        for segment in segments:
            if not segment.text:
                continue
            piece = self._continue(previous, segment.text)
            ids += piece
            labels += piece if segment.is_target else [IGNORE_INDEX] * len(piece)
            previous = segment.text
        return np.asarray(ids, dtype=np.int32), np.asarray(labels, dtype=np.int32)

    def _continue(self, previous: str, text: str) -> list[int]:
        """Ids of `text` standing behind `previous`."""
        if not previous:
            return self.encode(text)
        special = next((token for token in self.special if previous.endswith(token)), None)
        marker = special or _MARKER
        opening, whole = self.encode(marker), self.encode(marker + text)
        if whole[: len(opening)] == opening:
            return whole[len(opening) :]
        return self.encode(text)  # byte-level BPE may merge line feeds, and needs no marker
