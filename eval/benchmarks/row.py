"""One question of a benchmark, and what a parser makes of an answer to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

PLACE = "#"
"""As a key: the row's place in its files, counted from 0, where a file has no id of its own."""

How = Literal["exact", "extracted", "none"]
"""How a value was found: the answer is it, it was found in the answer, or nothing was found there."""


@dataclass(frozen=True)
class Row:
    """A question with its right answer, as a benchmark's files hold it.

    `key` identifies it, `options` are texts by letter, `fields` is the entry itself. `picture` is what names the
    picture: a file, an id or its bytes; None where the question has none.
    """

    key: tuple[str, ...]
    question: str
    truth: Any
    picture: Any = None
    options: Mapping[str, str] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The key in one text."""
        return "/".join(self.key)


@dataclass(frozen=True)
class Parsed:
    """What an answer says. None is never right; where `how` is none, a value is what the official code takes then."""

    value: Any
    how: How


NOTHING = Parsed(None, "none")
