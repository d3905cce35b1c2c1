"""The rows that are answered together: they join and leave between two tokens.

    join: newcomers --prefill, in a cache of their own--> first token of each --> beside the running rows
    step: one forward --> one more token of every row, each by its own decoding
    leave: rows that have ended, or that nobody waits for

A row's text is that of the same query asked alone. Has no threads: who calls it decides when rows come and go. Owns the
order of rows, and the tokens that they were given. Does not own keys and values (`eval.kv_cache`), how a prompt is read
(`eval.prefill`) nor the choice of a token and the end of an answer (`eval.decoding`).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from eval.decoding import AnswerText, Decoding, choose_tokens
from eval.kv_cache import KVCache
from eval.prefill import PromptReader
from eval.prompts import Prompt


@dataclass(eq=False)
class Row:
    """One answer that is being written. `cancel` says that nobody waits for it any more, from any thread."""

    prompt: Prompt
    decoding: Decoding
    text: AnswerText
    generator: torch.Generator
    cancel: threading.Event = field(default_factory=threading.Event)

    @property
    def need(self) -> int:
        """The most positions that it may take up: its prompt, and all tokens that it may get."""
        return len(self.prompt.ids) + self.text.max_tokens

    @property
    def has_ended(self) -> bool:
        """Whether no further token is wanted."""
        return self.text.done or self.cancel.is_set()


@dataclass
class StepCounts:
    """What the steps of a batch computed: rows a step, and the share of positions that were padding."""

    steps: int = 0
    rows: int = 0
    columns: int = 0
    tokens: int = 0
    """Of `columns`: those that hold a row's tokens."""


Pieces = list[tuple[Row, str]]
"""The text that a new token makes certain, of each row."""


class Batch:
    """The running rows, in the order of the cache's rows."""

    def __init__(self, reader: PromptReader, cache: KVCache) -> None:
        self.rows: list[Row] = []
        self.counts = StepCounts()
        self.is_torn = False
        self.cache = cache
        self._reader = reader

    def needs(self, newcomers: Sequence[Row] = ()) -> int:
        """The positions that are promised to the running rows, and to newcomers if they join, padding included."""
        return self.cache.num_positions([row.need for row in (*self.rows, *newcomers)])

    @property
    def can_join(self) -> bool:
        """Whether newcomers may join now."""
        return self.cache.can_join or not self.rows

    @torch.no_grad()
    def join(self, newcomers: Sequence[Row]) -> Pieces:
        """Read the newcomers' prompts and give each its first token. When it raises, the running rows are as before."""
        cache, logits_GV = self._reader.read([row.prompt for row in newcomers])
        ids = self._chosen(logits_GV, newcomers)
        self.cache.join(cache, [row.need for row in (*self.rows, *newcomers)])
        self.rows += newcomers
        return _pushed(newcomers, ids)

    @torch.no_grad()
    def step(self) -> Pieces:
        """Give each row one more token. When it raises, no row has got one.

        It may then be called again, unless `is_torn`: the last tokens have been read, and none was chosen after them.
        """
        last_ids = [row.text.ids[-1] for row in self.rows]
        logits_BV = self.cache.step(torch.tensor(last_ids, device=self._reader.device))
        self.is_torn = True
        ids = self._chosen(logits_BV, self.rows)
        self.is_torn = False
        self.counts.steps += 1
        self.counts.rows += len(self.rows)
        self.counts.columns += self.cache.num_columns
        self.counts.tokens += sum(self.cache.lengths)
        return _pushed(self.rows, ids)

    def _chosen(self, logits_BV: torch.Tensor, rows: Sequence[Row]) -> list[int]:
        chosen: list[int] = choose_tokens(
            logits_BV, [row.decoding for row in rows], [row.generator for row in rows]
        ).tolist()
        return chosen

    def leave(self) -> list[Row]:
        """Take out the rows that have ended, and return them; their keys and values are kept for a further turn."""
        leaving = [row for row in self.rows if row.has_ended]
        if leaving:
            self._remember(leaving)
            self.drop(leaving)
        return leaving

    def drop(self, rows: Sequence[Row]) -> None:
        """Take rows out."""
        order = self.cache.keep([place for place, row in enumerate(self.rows) if row not in rows])
        self.rows = [self.rows[place] for place in order]

    @torch.no_grad()
    def _remember(self, rows: Sequence[Row]) -> None:
        if self._reader.chats is not None and self.cache.can_join:  # with a sliding window a row lacks its beginning
            for row in rows:
                self._reader.chats.keep(row.prompt, row.text.ids, self.cache.copy_row(self.rows.index(row)))


def _pushed(rows: Sequence[Row], ids: Sequence[int]) -> Pieces:
    return [(row, row.text.push(token_id)) for row, token_id in zip(rows, ids, strict=True)]
