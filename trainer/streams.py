"""Named random streams: a seed for each purpose, all following from the recipe's one seed."""

from __future__ import annotations

import hashlib


def stream_seed(seed: int, *names: str | int) -> int:
    """A 63-bit seed that is a pure function of the recipe's seed and of what the stream is for."""
    text = "/".join([str(seed), *(str(name) for name in names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
