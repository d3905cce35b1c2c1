"""Keys and values of chats that were answered lately, so that a further turn reads only what is new.

    ids of a prompt --find--> keys and values of its first tokens, if a chat that is kept began alike

Owns what is kept, up to a number of bytes. Does not own how the rest is read (`eval.prefill`).
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from itertools import takewhile

from eval.kv_cache import KVRow
from eval.prompts import Prompt


@dataclass(frozen=True)
class _Chat:
    """`row` holds exactly `ids`, whose images have these digests."""

    ids: list[int]
    images: tuple[bytes, ...]
    row: KVRow
    num_bytes: int


class KeptChats:
    """The chats used last. Thread-safe. What is kept is never written to, so many rows may begin from one chat.

    The weights must not change meanwhile, so a model in training keeps none.
    """

    def __init__(self, limit_bytes: int, image_token_id: int) -> None:
        self.num_queries = self.num_hits = 0
        self.num_bytes = 0
        self._limit_bytes, self._image_token_id = limit_bytes, image_token_id
        self._chats: list[_Chat] = []
        self._lock = threading.Lock()

    def find(self, prompt: Prompt) -> KVRow | None:
        """The keys and values of the longest beginning of `prompt` that is kept; None where that is hardly any.

        It counts from half of the prompt or half of the chat on. A chat with other images does not count, nor a
        beginning behind which images follow. The prompt's last id is read again, for its logits.
        """
        with self._lock:
            self.num_queries += 1
            shared = [self._num_shared(prompt, chat) for chat in self._chats]
            best = max(range(len(shared)), key=shared.__getitem__, default=0)
            if not shared or 2 * shared[best] < min(len(prompt.ids), len(self._chats[best].ids)):
                return None
            self.num_hits += 1
            self._chats.append(self._chats.pop(best))
            chat = self._chats[-1]
        return chat.row.beginning(shared[best])

    def _num_shared(self, prompt: Prompt, chat: _Chat) -> int:
        if prompt.pixels.digests != chat.images:
            return 0
        pairs = zip(prompt.ids[:-1], chat.ids, strict=False)
        num_shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        return 0 if self._image_token_id in prompt.ids[num_shared:] else num_shared

    def keep(self, prompt: Prompt, answer_ids: list[int], row: KVRow) -> None:
        """Store a chat, whose last tokens `row` need not hold; chats that it goes on with need no place any more."""
        num_bytes = row.num_bytes
        if num_bytes > self._limit_bytes:
            return
        new = _Chat([*prompt.ids, *answer_ids][: row.length], prompt.pixels.digests, row, num_bytes)
        with self._lock:
            chats = [chat for chat in self._chats if not _is_beginning(chat, new)]
            self._chats = [*chats, new]
            self.num_bytes = sum(chat.num_bytes for chat in self._chats)
            while self.num_bytes > self._limit_bytes:
                self.num_bytes -= self._chats.pop(0).num_bytes

    def clear(self) -> None:
        """Forget all of them."""
        with self._lock:
            self._chats, self.num_bytes = [], 0


def _is_beginning(chat: _Chat, whole: _Chat) -> bool:
    return chat.images == whole.images and chat.ids == whole.ids[: len(chat.ids)]
