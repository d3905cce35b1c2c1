"""The worker's function: a reference to a sample -> its tokens and pixels, or the reason why it cannot be used.

Owns encoding one sample. It is a pure function of the reference; only open files and caches persist between calls.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
from PIL import Image

from data_pipeline.augment import Augmenter
from data_pipeline.control_tokens import ControlTokens
from data_pipeline.images import open_image
from data_pipeline.index import ShardIndex
from data_pipeline.record import Record, read_record
from data_pipeline.sample import BadSample, Encoded, SampleRef, TileArray, TokenArray
from data_pipeline.templates import Template
from data_pipeline.tiles import fit_image, fit_to_budget, fit_whole
from data_pipeline.tokens import Tokens
from models.common.errors import InputError, single_line
from models.patches import attention_pairs
from models.spec import IGNORE_INDEX, ImageSpec

ImageSizes = tuple[tuple[int, int], ...]


class Encoding(NamedTuple):
    """An encoded record: the fields of an `Encoded` except its reference."""

    input_ids: TokenArray  # [L]
    labels: TokenArray  # [L]
    tiles: TileArray  # [T, S, S, 3]
    image_sizes: ImageSizes
    """See `Encoded.image_sizes`."""
    num_shrunk: int
    """Number of images that got fewer tiles."""
    patch_pairs: tuple[int, int]
    """See `Encoded.patch_pairs`."""


@dataclass(frozen=True)
class ImageHandling:
    """Changes to images that only training makes. The default changes nothing."""

    scaled_jpeg: bool = False
    """Decode JPEGs at 1/2, 1/4 or 1/8 of their size where that leaves enough."""
    augmenter: Augmenter | None = None
    shrinks: bool = False
    """Give images fewer tiles, or at native resolution fewer patches, where the sample would be too long."""

    def smallest_side(self, size: int) -> int | None:
        """How many pixels of an image's shorter side a decoder must keep for squares of `size`; None: all."""
        if not self.scaled_jpeg:
            return None
        kept = self.augmenter.smallest_side_share if self.augmenter is not None else 1.0
        return math.ceil(size / kept)


@dataclass(frozen=True)
class Encoder:
    """`SampleRef` -> `Encoded`, or `BadSample` with the reason. Pickles into a worker."""

    indexes: Sequence[ShardIndex]
    """The sources, in the recipe's order."""
    template: Template
    tokens: Tokens
    image: ImageSpec
    max_length: int
    """Longest sample in tokens, image tokens included."""
    handling: ImageHandling = ImageHandling()
    kept_control_tokens: tuple[str, ...] = ()
    """Control tokens that answers may write; all others are text where the data spell them."""

    @cached_property
    def control_tokens(self) -> ControlTokens:
        """What stays text where a turn spells it."""
        try:
            jinja = self.template.jinja()
        except InputError:  # pairs are no chat
            jinja = ""
        return ControlTokens.of(self.tokens.protected, self.tokens.special, jinja)

    @cached_property
    def _control_tokens_of_answers(self) -> ControlTokens:
        return self.control_tokens.without(self.kept_control_tokens)

    def __call__(self, ref: SampleRef) -> Encoded | BadSample:
        """Read, decode and tokenize a sample.

        Whatever a decoder, the tokenizer or the template raises on one sample costs that sample.
        """
        try:
            files = self.indexes[ref.source].read(ref.sample)
        except InputError as error:
            return BadSample(ref, str(error))
        try:
            encoding = self.encode_record(read_record(files), ref)
        except InputError as error:
            return BadSample(ref, str(error))
        except Exception as error:  # TypeError of a tokenizer, a template's own error, MemoryError of a decoder ...
            return BadSample(ref, f"{type(error).__name__}: {single_line(error)}")
        num_tokens = len(encoding.input_ids)
        if num_tokens > self.max_length:
            return BadSample(ref, f"{num_tokens} tokens, more than max_length {self.max_length}", kind="too_long")
        return Encoded(ref, *encoding)

    def encode_record(self, record: Record, ref: SampleRef | None = None) -> Encoding:
        """Tokens and pixels of a record, however long.

        Args:
            ref: seeds the augmentation, if there is any; None turns it off.

        Raises:
            InputError: an image that cannot be decoded, or a sample without a target.
        """
        turns = [replace(turn, text=self._control_tokens_of(turn.role).mark(turn.text)) for turn in record.turns]
        ids, labels = self.tokens.encode_segments(self.template.segments(turns))
        if not np.any(labels[1:] != IGNORE_INDEX):
            raise InputError("nothing in it is a target: the answers are empty")
        images, num_shrunk = [self._open(payload, ref, place) for place, payload in enumerate(record.images)], 0
        if len(images) > 1 and self.image.several_are_whole:
            fitted = [fit_whole(image, self.image) for image in images]
        elif self.handling.shrinks:
            num_text = int(np.count_nonzero(ids != self.tokens.image_token_id))
            fitted, num_shrunk = fit_to_budget(images, self.image, self.max_length - num_text)
        else:
            fitted = [fit_image(image, self.image) for image in images]
        nothing = np.empty((0, self.image.size, self.image.size, 3), dtype=np.uint8)
        tiles = np.concatenate([nothing, *(each.tiles for each in fitted)])
        costs = [each.num_tokens for each in fitted]
        ids, labels = expand_images(ids, labels, self.tokens.image_token_id, costs)
        sizes, grid = tuple(each.size for each in fitted), self.image.fit.grid
        pairs = (0, 0) if grid is None else attention_pairs(grid, sizes)
        return Encoding(ids, labels, tiles, sizes, num_shrunk, pairs)

    def _control_tokens_of(self, role: str) -> ControlTokens:
        return self._control_tokens_of_answers if role == "assistant" else self.control_tokens

    def _open(self, payload: bytes, ref: SampleRef | None, place: int) -> Image.Image:
        """The `place`-th image of a sample, augmented with the draw's random numbers where the recipe asks for it."""
        image = open_image(payload, at_least=self.handling.smallest_side(self.image.size))
        if self.handling.augmenter is None or ref is None:
            return image
        return self.handling.augmenter(image, ref, place)


def expand_images(
    ids: TokenArray, labels: TokenArray, image_token_id: int, costs: Sequence[int]
) -> tuple[TokenArray, TokenArray]:
    """Repeat each image token once for each token of its image.

    Raises:
        InputError: the numbers of image tokens and images differ.
    """
    places = np.flatnonzero(ids == image_token_id)
    if len(places) != len(costs):
        raise InputError(f"{len(costs)} images, but {len(places)} image tokens after the chat template")
    repeats = np.ones(len(ids), dtype=np.int64)
    repeats[places] = costs
    return np.repeat(ids, repeats), np.repeat(labels, repeats)
