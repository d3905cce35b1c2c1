"""Text -> token ids, segment by segment, without transformers or torch in the worker.

Owns how each kind of tokenizer continues a piece of text after another. Does not own the text (`templates`).

A conversation is tokenized in segments, so that the prompt's ids never depend on the answer that follows it. Tokenizers
differ in what they do at the start of a segment:
- byte-level BPE (Qwen, Llama 3, SmolLM): nothing;
- SentencePiece kept as `legacy` (Llama 2, Vicuna): a space is put before the text and after every special token;
- SentencePiece with `prepend_scheme: first`: a space is put at the very start only.
A segment that continues another is therefore encoded after a marker whose ids are then removed.

Text of a user that is spelled like a control token is put between marks (`control_tokens`) and is encoded without added
tokens, as transformers' `encode_marked_chat` does it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipeline.control_tokens import split_marked
from data_pipeline.sample import TokenArray
from models.common.errors import InputError
from models.spec import IGNORE_INDEX, IMAGE_TOKEN

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_MARKER = "\n"
"""SentencePiece vocabularies hold a line feed as one byte token that never merges with what follows."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a conversation as text, special tokens written out; `is_target` if it is trained on."""

    text: str
    is_target: bool


@dataclass(frozen=True, slots=True)
class Tokens:
    """The parts of a tokenizer that the pipeline needs; pickles without transformers."""

    backend: Tokenizer
    bos: str
    """The text every prompt begins with; empty where the tokenizer adds none."""
    eos: str
    special: frozenset[str]
    chat_template: str | None
    image_token_id: int
    protected: frozenset[str] = frozenset()
    """Those of `special` that are control tokens whatever the template writes."""
    variables: Mapping[str, str | list[str]] = field(default_factory=dict)
    """What transformers hands every chat template: `bos_token`, `eos_token` and their like."""
    image_token: str = IMAGE_TOKEN
    """How this tokenizer spells the placeholder of an image."""

    @classmethod
    def of(cls, tokenizer: Any, image_token: str = IMAGE_TOKEN) -> Tokens:
        """Convert a transformers tokenizer whose placeholder of an image is `image_token`.

        Raises:
            InputError: a Python-only tokenizer, or one without the image token or an end token.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise InputError(f"{type(tokenizer).__name__} has no fast version; convert it to a tokenizer.json first")
        added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
        if image_token not in added:
            raise InputError(f"the tokenizer lacks {image_token}; add it as a special token first")
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
            image_token_id=int(tokenizer.convert_tokens_to_ids(image_token)),
            protected=_protected(tokenizer),
            variables=dict(tokenizer.special_tokens_map),
            image_token=image_token,
        )

    @property
    def space_behind_special(self) -> str:
        """What makes text behind a special token begin as the whole text begins: a space, or nothing.

        SentencePiece as transformers has it with `legacy: false` puts its space before the whole text and not behind a
        special token. LLaVA's preprocessing tokenizes what lies between images piece by piece, each with that space.
        """
        alone, behind, spaced = (self.encode(text) for text in ("x", f"{self.image_token}x", f"{self.image_token} x"))
        return " " if spaced[1:] == alone != behind[1:] else ""

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
        """Ids and labels [L] of a conversation, the image token once per image."""
        ids: list[int] = []
        labels: list[int] = []
        previous = ""
        for segment in segments:
            for place, text in enumerate(split_marked(segment.text)):
                if not text:
                    continue
                is_spelt = bool(place % 2)
                piece = self._spelt(text) if is_spelt else self._continue(previous, text)
                ids += piece
                labels += piece if segment.is_target else [IGNORE_INDEX] * len(piece)
                previous = _MARKER if is_spelt else text
        return np.asarray(ids, dtype=np.int32), np.asarray(labels, dtype=np.int32)

    def _continue(self, previous: str, text: str) -> list[int]:
        """Ids of `text` as a continuation of `previous`."""
        if not previous:
            return self.encode(text)
        special = max((token for token in self.special if previous.endswith(token)), key=len, default=None)
        marker = special or _MARKER
        opening, whole = self.encode(marker), self.encode(marker + text)
        if whole[: len(opening)] == opening:
            return whole[len(opening) :]
        return self.encode(text)  # byte-level BPE may merge line feeds, and needs no marker

    def _spelt(self, text: str) -> list[int]:
        """Ids of a control token's name as plain text.

        Raises:
            InputError: plain text makes the control token itself.
        """
        opening, whole = self._plain(_MARKER), self._plain(_MARKER + text)
        ids = whole[len(opening) :] if whole[: len(opening)] == opening else self._plain(text)
        if self.backend.token_to_id(text) in ids:
            raise InputError(f"the text spells {text!r}, which this tokenizer cannot write as plain text")
        return ids

    def _plain(self, text: str) -> list[int]:
        """Ids of a text in which no added token counts, special or not."""
        if self.backend.normalizer is not None:
            text = self.backend.normalizer.normalize_str(text)
        pieces = [text]
        if self.backend.pre_tokenizer is not None:
            pieces = [piece for piece, _ in self.backend.pre_tokenizer.pre_tokenize_str(text)]
        return [token.id for piece in pieces for token in self.backend.model.tokenize(piece)]


def _protected(tokenizer: Any) -> frozenset[str]:
    """Control tokens by the tokenizer's own word: special ones, and those it lists for chats."""
    listed = set(getattr(tokenizer, "chat_control_tokens", None) or ())
    added = tokenizer.added_tokens_decoder.values()
    return frozenset(str(token) for token in added if getattr(token, "special", True) or str(token) in listed)
