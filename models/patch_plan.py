"""The patches of a micro-batch's images as tensors: what `models.patches` knows of each, one after another.

G images, P patches of all of them in order, W windows.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.patches import patches_of
from models.spec import ImageSizes, PatchGrid


@dataclass(frozen=True)
class PatchPlan:
    """Where the patches of some images are. A tower with windows computes window after window, in "its order"."""

    places_P2: Tensor
    """int64, (row, column) of each patch in its image, in the tower's order."""
    starts_G1: Tensor
    """int32, where each image begins among the patches, and P."""
    lengths: tuple[int, ...]
    """The same on the host, as lengths."""
    order_P: Tensor | None
    """int64, the tower's order; None: as they come."""
    inverse_P: Tensor | None
    """int64, the way back from it."""
    window_starts_W1: Tensor | None
    """int32, where each window begins in the tower's order, and P."""
    window_lengths: tuple[int, ...]
    taps_P4: Tensor | None
    """int64, the four rows of the table of learnt positions that a patch's own is between."""
    weights_P4: Tensor | None
    """float32, the share of each."""

    @property
    def attention_pairs(self) -> tuple[int, int]:
        """Pairs of patches of the same image, and of the same window; without windows the first number twice."""
        whole = sum(length**2 for length in self.lengths)
        return whole, sum(length**2 for length in self.window_lengths) if self.window_lengths else whole

    def to(self, device: torch.device) -> PatchPlan:
        """The same on a device; the copies do not wait for it."""
        moved: dict[str, Any] = {}
        for field in fields(self):
            held = getattr(self, field.name)
            if isinstance(held, Tensor):
                moved[field.name] = held.to(device, non_blocking=True)
        return replace(self, **moved)


def plan_patches(grid: PatchGrid, sizes: ImageSizes) -> PatchPlan:
    """The plan of images of the fitted `sizes` (height, width) in pixels; without any, that of the smallest image.

    That one is run so that every weight takes part (`NativeTower.image_features`).
    """
    found = [patches_of(grid, *grid.patches(*size)) for size in sizes or [(grid.factor, grid.factor)]]
    lengths = [len(each.places_P2) for each in found]
    starts = [0, *accumulate(lengths)]
    places = np.concatenate([each.places_P2 for each in found])
    order = inverse = window_starts = taps = weights = None
    windows: list[int] = []
    if grid.window is not None:
        block = np.arange(grid.merge**2)
        units = [each.units + start // len(block) for each, start in zip(found, starts[:-1], strict=True)]
        order = (np.concatenate(units)[:, None] * len(block) + block).ravel()
        places, inverse = places[order], np.argsort(order)
        windows = [length for each in found for length in each.window_lengths]
        window_starts = torch.tensor([0, *accumulate(windows)], dtype=torch.int32)
    if grid.table_side is not None:
        taps = np.concatenate([each.taps_P4 for each in found])
        weights = np.concatenate([each.weights_P4 for each in found])
    return PatchPlan(
        places_P2=torch.from_numpy(places),
        starts_G1=torch.tensor(starts, dtype=torch.int32),
        lengths=tuple(lengths),
        order_P=None if order is None else torch.from_numpy(order),
        inverse_P=None if inverse is None else torch.from_numpy(inverse),
        window_starts_W1=window_starts,
        window_lengths=tuple(windows),
        taps_P4=None if taps is None else torch.from_numpy(taps),
        weights_P4=None if weights is None else torch.from_numpy(weights),
    )
