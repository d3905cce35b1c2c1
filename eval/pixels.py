"""What a bundle's processor makes of a chat's images, so that images which are asked about again need not be decoded.

    images --processor--> Pixels: tensors for the model, and what the processor makes placeholders from
                            |
    the same images later --+--> the same prompt, as if they had been processed again

Owns the tensors of a chat's images and their digests. Does not own the chat (`eval.prompts`) nor what is kept of them
(`eval.lru_cache`).
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

GRIDS = "image_grid_thw"
"""What a processor of native resolution calls the frames, rows and columns of each image's patches."""


@dataclass(frozen=True, eq=False)
class Pixels:
    """The images of one chat, in their order; false where it has none."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """The processor's, by the names that the model has for them; the first dimension is images, or patches of all."""
    output: Any = None
    """What the image processor returned, from which the processor makes placeholders; None where it is not known."""

    def __bool__(self) -> bool:
        return bool(self.tensors)

    @property
    def num_bytes(self) -> int:
        """The memory that they take."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @cached_property
    def digests(self) -> tuple[bytes, ...]:
        """Of each image, a digest of its pixels: images with the same one have the same features."""
        counted = self.tensors.get(GRIDS, next(iter(self.tensors.values()), ()))
        return tuple(_digest(self.image(place)) for place in range(len(counted)))

    def image(self, place: int) -> dict[str, Tensor]:
        """The tensors of one image."""
        if GRIDS not in self.tensors:
            return {name: values[place : place + 1] for name, values in self.tensors.items()}
        grids = self.tensors[GRIDS]
        patches = self.tensors["pixel_values"].split(grids.prod(dim=1).tolist())[place]
        return {"pixel_values": patches, GRIDS: grids[place : place + 1]}


NO_PIXELS = Pixels()
"""Of a chat without images."""


def _digest(tensors: Mapping[str, Tensor]) -> bytes:
    digest = hashlib.sha256()
    for name, values in sorted(tensors.items()):
        digest.update(repr((name, tuple(values.shape), values.dtype)).encode())
        digest.update(values.contiguous().numpy().data)
    return digest.digest()


def stack_pixels(tensors: Sequence[Mapping[str, Tensor]], device: torch.device) -> dict[str, Tensor]:
    """The processor's tensors of several chats as one of each name, the images in order.

    Where images have several tiles, those with fewer get blank ones appended, as the processor itself does.
    """
    names = dict.fromkeys(name for each in tensors for name in each)
    parts = {name: [each[name] for each in tensors if name in each] for name in names}
    for found in parts.values():
        if found[0].ndim == 5:  # images, tiles, channels, height, width
            most = max(tensor.shape[1] for tensor in found)
            found[:] = [F.pad(tensor, (0, 0) * 3 + (0, most - tensor.shape[1])) for tensor in found]
    return {name: torch.cat(found).to(device) for name, found in parts.items()}


def recording(processor: Any, output: Any = None) -> Any:
    """A copy of a processor whose image processor records what it returns, as `image_processor.output`.

    With `output`, which was recorded before, it does no work and returns that.
    """
    own, images = copy.copy(processor), copy.copy(processor.image_processor)
    stock: Any = type(images)
    images.__class__ = _recording(stock)
    images.output = output
    own.image_processor = images
    return own


@cache
def _recording(stock: Any) -> type:
    class Recording(stock):
        """`stock`, for the images of one chat."""

        output: Any = None

        def __call__(self, images: Any, **options: Any) -> Any:
            if self.output is None:
                self.output = super().__call__(images, **options)
            return copy.copy(self.output)  # whoever gets it may take parts out

    return Recording
