"""The values that move through the pipeline: a reference to a sample, the sample as tokens and pixels, and a row of the
batch.

Owns the plain values that are sent to workers and returned. Legend: L tokens, T tiles or patches, S a tile's side.
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
class SampleRef:
    """A draw that has been resolved: the slot and number of the draw, and the sample.

    `data_pipeline.sample_order` makes it, in the main process; it is all that a worker needs to find the sample.
    """

    slot: int
    """The row of the global batch that this draw belongs to."""
    n: int
    """How many draws the slot made before this one, over all epochs."""
    source: int
    """Index of the source among the recipe's."""
    sample: int
    """Index of the sample within its source."""
    shard: str
    key: str


class _Named:
    """A processed reference, with the sample's shard and key."""

    __slots__ = ()
    ref: SampleRef

    @property
    def shard(self) -> str:
        """Name of the tar that the sample is from."""
        return self.ref.shard

    @property
    def key(self) -> str:
        """The sample's key in its tar."""
        return self.ref.key


@dataclass(frozen=True, slots=True)
class Encoded(_Named):
    """A sample as tokens and pixels.

    `labels` follow Hugging Face's convention: aligned with `input_ids`, not shifted, `IGNORE_INDEX` where there is no
    target. An image is `num_image_tokens` copies of the image token.
    """

    ref: SampleRef
    input_ids: TokenArray  # [L]
    labels: TokenArray  # [L]
    tiles: TileArray  # [T, S, S, 3]
    image_sizes: tuple[tuple[int, int], ...] = ()
    """(height, width) of each image before resizing, by which AnyRes assigns tiles to images; at native resolution
    after it, which gives its rows and columns of patches."""
    num_shrunk: int = 0
    """Number of images that got fewer tiles because of `max_length`."""
    patch_pairs: tuple[int, int] = (0, 0)
    """At native resolution, pairs of patches of the same image, and of the same window: what attention costs."""

    @property
    def num_tokens(self) -> int:
        """Length of the sample, image tokens included."""
        return len(self.input_ids)

    @property
    def num_targets(self) -> int:
        """Positions that carry a target once labels are shifted: the first token is never predicted."""
        return int(np.count_nonzero(self.labels[1:] != IGNORE_INDEX))


@dataclass(frozen=True, slots=True)
class BadSample(_Named):
    """A sample that is skipped because it cannot be used, and why."""

    ref: SampleRef
    reason: str
    kind: Literal["bad", "too_long"] = "bad"
    """Broken, or valid but longer than `max_length`."""

    def __str__(self) -> str:
        return f"{self.shard} {self.key}: {self.reason}"


Row = tuple[Encoded, ...]
"""One row of the batch; empty once its slot has run out."""
