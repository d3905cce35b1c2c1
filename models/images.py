"""The images of some rows of text, passed as one value from collating to the vision encoder.

T tiles of all rows in order, S the tile's side in pixels, C = 3 channels.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from models.patch_plan import PatchPlan


@dataclass(frozen=True)
class Images:
    """Images in the order of their image tokens.

    Under AnyRes an image has several tiles; at native resolution its tiles are its patches; else it has one.
    """

    tiles_TSSC: Tensor
    """uint8: scaled and normalised on the device. [0, 1, 1, 3] where there is no image."""
    sizes: tuple[tuple[int, int], ...]
    """(height, width) of each image, on the host: before resizing under AnyRes, which assigns tiles to images by them;
    as it was resized at native resolution."""
    tile_rows_T: Tensor
    """int64, the row of the micro-batch that each tile belongs to."""
    plan: PatchPlan | None = None
    """At native resolution, where the patches are."""
