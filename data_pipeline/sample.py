"""What moves through the pipeline: a draw, what became of it, and a row of the batch.

Owns the plain values that workers hand to the main process. Legend: L tokens, T tiles, S the tile's side in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from models.spec import IGNORE_INDEX

TokenArray = NDArray[np.int32]
TileArray = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Draw:
    """The n-th sample that slot `slot` of the global batch takes from the stream."""

    slot: int
    n: int


@dataclass(frozen=True, slots=True)
class Encoded:
    """A sample as tokens and pixels.

    `labels` follow Hugging Face's convention: aligned with `input_ids`, not shifted, `IGNORE_INDEX` where nothing is
    learnt. A picture is `num_image_tokens` copies of the image token.
    """

    draw: Draw
    shard: str
    key: str
    input_ids: TokenArray  # [L]
    labels: TokenArray  # [L]
    tiles: TileArray  # [T, S, S, 3]
    picture_sizes: tuple[tuple[int, int], ...] = ()
    """(height, width) of each picture before it was fitted: under AnyRes they say which tiles are whose."""
    num_shrunk: int = 0
    """Pictures that got fewer tiles than they would have in a longer row."""

    @property
    def num_tokens(self) -> int:
        """Length of the sample, image tokens included."""
        return len(self.input_ids)

    @property
    def num_targets(self) -> int:
        """Positions that carry a target once labels are shifted: the first token is never predicted."""
        return int(np.count_nonzero(self.labels[1:] != IGNORE_INDEX))


@dataclass(frozen=True, slots=True)
class BadSample:
    """A sample that cannot be used, and why. `kind` tells broken ones from those that are merely too long."""

    draw: Draw
    shard: str
    key: str
    reason: str
    kind: Literal["bad", "too_long"] = "bad"


Row = tuple[Encoded, ...]
"""One row of the batch; empty once its slot has run out."""
