"""Images of native resolution as patches: everything that a tower and a decoder need to know of them, from sizes alone.

    sizes of fitted images --PatchGrid--> places of patches, windows, learnt positions   (the tower, `patch_plan`)
                                      '-> three positions of each token, M-RoPE          (the decoder, `rope_positions`)

Pure functions on the host, computed while a batch is collated, so that nothing in a forward waits for the device.
Without torch, which the workers of the data pipeline do not load.
Equals transformers' `vision_utils` and `get_rope_index`; for videos, which are not known here, those do more.

P patches of all images in order, G images, W windows, L tokens of a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from models.spec import ImageSizes, PatchGrid

Ints = NDArray[np.int64]
Value = TypeVar("Value", bound=np.generic)


class ImagePatches(NamedTuple):
    """The arrays of one image, in the order in which its patches come."""

    places_P2: Ints
    units: Ints
    """Blocks of patches, one for each image token, window after window."""
    window_lengths: tuple[int, ...]
    taps_P4: Ints
    weights_P4: NDArray[np.float32]


@lru_cache(maxsize=4096)
def patches_of(grid: PatchGrid, num_rows: int, num_columns: int) -> ImagePatches:
    """What is known of an image of so many patches."""
    rows, columns = np.divmod(np.arange(num_rows * num_columns).reshape(num_rows, num_columns), num_columns)
    places = np.stack([in_blocks(rows, grid.merge).ravel(), in_blocks(columns, grid.merge).ravel()], axis=1)
    units, lengths = _windows(num_rows // grid.merge, num_columns // grid.merge, grid.window)
    taps, weights = np.zeros((0, 4), dtype=np.int64), np.zeros((0, 4), dtype=np.float32)
    if grid.table_side is not None:
        (low, low_share), (left, left_share) = (
            _taps(places[:, axis], size, grid.table_side) for axis, size in enumerate((num_rows, num_columns))
        )
        taps = (low[:, :, None] * grid.table_side + left[:, None, :]).reshape(-1, 4)
        weights = (low_share[:, :, None] * left_share[:, None, :]).reshape(-1, 4)
    return ImagePatches(places, units, tuple(n * grid.merge**2 for n in lengths), taps, weights)


def attention_pairs(grid: PatchGrid, sizes: ImageSizes) -> tuple[int, int]:
    """`models.patch_plan.PatchPlan.attention_pairs` of images of the fitted `sizes`; nothing without any."""
    found = [patches_of(grid, *grid.patches(*size)) for size in sizes]
    whole = sum(len(each.places_P2) ** 2 for each in found)
    windows = sum(length**2 for each in found for length in each.window_lengths)
    return whole, windows if grid.window is not None else whole


def in_blocks(values_RC: NDArray[Value], merge: int) -> NDArray[Value]:
    """[rows, columns, ...] -> [patches, ...]: block after block of merge x merge, row by row in each."""
    num_rows, num_columns, *rest = values_RC.shape
    blocks = values_RC.reshape(num_rows // merge, merge, num_columns // merge, merge, *rest)
    return blocks.swapaxes(1, 2).reshape(num_rows * num_columns, *rest)


def _windows(num_rows: int, num_columns: int, side: int | None) -> tuple[Ints, list[int]]:
    """Image tokens window after window, and how many are in each; those at the right and below may be smaller."""
    units = np.arange(num_rows * num_columns).reshape(num_rows, num_columns)
    if side is None:
        return units.ravel(), []
    windows = [
        units[top : top + side, left : left + side].ravel()
        for top in range(0, num_rows, side)
        for left in range(0, num_columns, side)
    ]
    return np.concatenate(windows), [len(window) for window in windows]


def _taps(place_P: Ints, size: int, side: int) -> tuple[Ints, NDArray[np.float32]]:
    """The two neighbours of each place in a row of `side` that is stretched to `size`, and their shares.

    Both ends of the two rows coincide. In fp32, as transformers computes it.
    """
    source_P = place_P.astype(np.float32) * np.float32(side - 1) / np.float32(max(size - 1, 1))
    low_P = np.floor(source_P)
    both = np.arange(2)
    share = np.maximum(1 - np.abs(source_P[:, None] - low_P[:, None] - both.astype(np.float32)), 0)
    return np.minimum(low_P.astype(np.int64)[:, None] + both, side - 1), share.astype(np.float32)


def rope_positions(is_image_L: NDArray[np.bool_], sizes: ImageSizes, grid: PatchGrid) -> Ints:
    """The positions [3, L] of one sample's tokens by time, row and column (M-RoPE).

    Text counts up in all three. An image keeps one time, its rows and columns count from there, and the text goes on
    behind the longer of its sides.

    Args:
        sizes: (height, width) in pixels of the sample's fitted images, whose tokens stand side by side.

    Raises:
        ValueError: the images have another number of tokens.
    """
    length, image_I = len(is_image_L), np.flatnonzero(is_image_L)
    shapes = [(height // grid.factor, width // grid.factor) for height, width in sizes]
    if sum(rows * columns for rows, columns in shapes) != len(image_I):
        raise ValueError(f"{len(image_I)} image tokens, but images of the sizes {list(sizes)} have others")
    positions = np.empty((3, length), dtype=np.int64)
    token = position = taken = 0
    for rows, columns in shapes:
        first, end = int(image_I[taken]), int(image_I[taken]) + rows * columns
        positions[:, token:first] = position + np.arange(first - token)
        position += first - token
        positions[0, first:end] = position
        positions[1, first:end] = position + np.repeat(np.arange(rows), columns)
        positions[2, first:end] = position + np.tile(np.arange(columns), rows)
        position += max(rows, columns)
        token, taken = end, taken + rows * columns
    positions[:, token:] = position + np.arange(length - token)
    return positions


def rope_of_samples(is_image: Sequence[NDArray[np.bool_]], sizes: ImageSizes, grid: PatchGrid) -> Ints:
    """`rope_positions` of samples one after another, [3, N]; `sizes` are those of all their images in order."""
    found, taken = [], 0
    for is_image_L in is_image:
        num_tokens, end = int(np.count_nonzero(is_image_L)), taken
        while num_tokens > 0 and end < len(sizes):
            num_tokens -= (sizes[end][0] // grid.factor) * (sizes[end][1] // grid.factor)
            end += 1
        found.append(rope_positions(is_image_L, sizes[taken:end], grid))
        taken = end
    return np.concatenate(found, axis=1)
