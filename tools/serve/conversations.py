"""Chats that the server remembers between requests: bounded in bytes and in time, and forgotten when told to.

A conversation's id is a secret of the client that began it: another client's same id is another conversation.
Used on the event loop alone.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from data_pipeline.record import Turn
from tools.serve.errors import ApiError, invalid

KEPT_S = 3600.0
MAX_BYTES = 256_000_000
_CHAT_BYTES = 1000
"""What a chat takes beside its texts and its picture."""


@dataclass(frozen=True)
class Conversation:
    """A picture, as the file that was sent, and the turns so far."""

    picture: bytes | str | None = None
    turns: tuple[Turn, ...] = ()

    def asked(self, text: str) -> Conversation:
        """This chat with one more question."""
        return replace(self, turns=(*self.turns, Turn("user", text)))

    def answered(self, text: str) -> Conversation:
        """This chat with the answer to its last question."""
        return replace(self, turns=(*self.turns, Turn("assistant", text)))

    @property
    def num_bytes(self) -> int:
        """The memory that it takes."""
        return _CHAT_BYTES + len(self.picture or "") + sum(4 * len(turn.text) for turn in self.turns)


@dataclass
class _Kept:
    conversation: Conversation
    used_s: float = field(default_factory=time.monotonic)


class Conversations:
    """The last that were used, as far as they fit.

    Args:
        max_bytes: of all together; those that were used longest ago go first.
        kept_s: how long one is kept after its last use.
        clock: seconds that only grow.
    """

    def __init__(
        self, max_bytes: int = MAX_BYTES, kept_s: float = KEPT_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._max_bytes, self._kept_s, self._clock = max_bytes, kept_s, clock
        self._kept: OrderedDict[tuple[str, str], _Kept] = OrderedDict()
        self._busy: set[tuple[str, str]] = set()
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    @contextmanager
    def turn(self, client: str, name: str) -> Iterator[None]:
        """Keep others from going on with the same conversation within the block.

        Raises:
            ApiError: 409, somebody is.
        """
        key = (client, name)
        if key in self._busy:
            text = "another message of this conversation is being answered: wait for its answer"
            raise ApiError(409, text, code="conversation_busy", param="conversation_id", retry_after_s=1)
        self._busy.add(key)
        try:
            yield
        finally:
            self._busy.discard(key)

    def find(self, client: str, name: str) -> Conversation:
        """The conversation so far; a new one where there is none of that id."""
        self._forget_old()
        kept = self._kept.get((client, name))
        return kept.conversation if kept is not None else Conversation()

    def keep(self, client: str, name: str, conversation: Conversation) -> None:
        """Remember a conversation, and forget others where they are too many."""
        self.forget(client, name)
        if conversation.num_bytes > self._max_bytes:
            return
        self._kept[client, name] = _Kept(conversation, self._clock())
        self.num_bytes += conversation.num_bytes
        self._forget_old()

    def forget(self, client: str, name: str) -> bool:
        """Forget a conversation; whether there was one."""
        kept = self._kept.pop((client, name), None)
        if kept is not None:
            self.num_bytes -= kept.conversation.num_bytes
        return kept is not None

    def _forget_old(self) -> None:
        while self._kept:
            key, oldest = next(iter(self._kept.items()))
            if self.num_bytes <= self._max_bytes and self._clock() - oldest.used_s <= self._kept_s:
                return
            self.forget(*key)


def check_name(name: str) -> str:
    """An id as it may be; raises ApiError for any other."""
    if not 1 <= len(name) <= 128 or not name.isprintable():
        raise invalid("a conversation_id has 1 to 128 printable characters", "conversation_id")
    return name
