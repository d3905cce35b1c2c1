"""Named random streams: a seed for each purpose, all derived from the recipe's seed.

No two purposes share a stream, so more draws for one (another dropout, a new adapter) do not change the others.
"""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, *names: str | int) -> int:
    """The seed of the stream that `names` identify: its purpose, and its stage, step or rank.

    Args:
        seed: the recipe's.
        names: joined by "/"; a change of them changes every run's numbers.

    Returns:
        63 bits of SHA-256: fits a signed 64-bit integer, which torch and numpy take. The same on every machine.
    """
    text = "/".join([str(seed), *(str(name) for name in names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
