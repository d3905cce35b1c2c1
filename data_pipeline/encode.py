"""The worker's function: a draw -> tokens and pixels, or the reason why not.

Owns putting the parts together for one sample. It is a pure function of the draw; it keeps nothing between calls but
open files and caches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from data_pipeline.augment import Augmenter
from data_pipeline.images import open_picture
from data_pipeline.index import ShardIndex
from data_pipeline.mixture import Plan
from data_pipeline.record import Record, read_record
from data_pipeline.sample import BadSample, Draw, Encoded, TileArray, TokenArray
from data_pipeline.templates import Template
from data_pipeline.tiles import fit_tiles, shrink_to_budget
from data_pipeline.tokens import Tokens
from models.errors import InputError
from models.spec import IGNORE_INDEX, ImageSpec, num_image_tokens

PictureSizes = tuple[tuple[int, int], ...]


class Encoder:
    """Draw -> `Encoded`, or `BadSample` with the reason. Pickles into a worker."""

    def __init__(
        self,
        indexes: Sequence[ShardIndex],
        plan: Plan,
        *,
        template: Template,
        tokens: Tokens,
        image: ImageSpec,
        max_length: int,
        scaled_jpeg: bool = False,
        augmenter: Augmenter | None = None,
        fewer_tiles: bool = False,
    ) -> None:
        self.indexes = tuple(indexes)
        self.plan = plan
        self.template = template
        self.tokens = tokens
        self.image = image
        self.max_length = max_length
        self._augmenter = augmenter
        self._fewer_tiles = fewer_tiles
        kept = augmenter.smallest_side_share if augmenter is not None else 1.0
        self._at_least = math.ceil(image.size / kept) if scaled_jpeg else None

    def __call__(self, draw: Draw) -> Encoded | BadSample:
        """Read, decode and tokenize the sample of a draw."""
        source, sample = self.plan.locate(draw.slot, draw.n)
        index = self.indexes[source]
        shard, key = index.shard_of(sample), index.key_of(sample)
        try:
            ids, labels, tiles, sizes, num_shrunk = self.encode_record(read_record(index.read(sample)), draw)
        except InputError as error:
            return BadSample(draw, shard, key, str(error))
        if len(ids) > self.max_length:
            reason = f"{len(ids)} tokens, more than max_length {self.max_length}"
            return BadSample(draw, shard, key, reason, kind="too_long")
        return Encoded(draw, shard, key, ids, labels, tiles, sizes, num_shrunk)

    def name_of(self, draw: Draw) -> tuple[str, str]:
        """(shard, key) of a draw's sample, which is not read."""
        source, sample = self.plan.locate(draw.slot, draw.n)
        return self.indexes[source].shard_of(sample), self.indexes[source].key_of(sample)

    def encode_record(
        self, record: Record, draw: Draw | None = None
    ) -> tuple[TokenArray, TokenArray, TileArray, PictureSizes, int]:
        """Ids [L], labels [L], tiles [T, S, S, 3], (height, width) of each picture, and how many got fewer tiles.

        Args:
            draw: whose random numbers change the pictures, where the data are augmented; None leaves them as they are.

        Raises:
            InputError: a picture that cannot be decoded, or a sample in which nothing is to be learnt.
        """
        ids, labels = self.tokens.encode_segments(self.template.segments(record.turns))
        if not np.any(labels[1:] != IGNORE_INDEX):
            raise InputError("nothing in it is a target: the answers are empty")
        pictures, num_shrunk = [self._open(payload, draw, place) for place, payload in enumerate(record.pictures)], 0
        if self._fewer_tiles:
            num_text = int(np.count_nonzero(ids != self.tokens.image_token_id))
            pictures, num_shrunk = shrink_to_budget(pictures, self.image, self.max_length - num_text)
        nothing = np.empty((0, self.image.size, self.image.size, 3), dtype=np.uint8)
        tiles = np.concatenate([nothing, *(fit_tiles(picture, self.image) for picture in pictures)])
        costs = [num_image_tokens(self.image, picture.width, picture.height) for picture in pictures]
        ids, labels = expand_images(ids, labels, self.tokens.image_token_id, costs)
        return ids, labels, tiles, tuple((picture.height, picture.width) for picture in pictures), num_shrunk

    def _open(self, payload: bytes, draw: Draw | None, place: int) -> Image.Image:
        """A picture of the sample, changed by the draw's random numbers where the data are augmented."""
        picture = open_picture(payload, at_least=self._at_least)
        if self._augmenter is None or draw is None:
            return picture
        return self._augmenter(picture, draw, place)


def expand_images(
    ids: TokenArray, labels: TokenArray, image_token_id: int, costs: Sequence[int]
) -> tuple[TokenArray, TokenArray]:
    """Repeat each image token as often as its picture costs.

    Raises:
        InputError: the numbers of image tokens and pictures differ.
    """
    places = np.flatnonzero(ids == image_token_id)
    if len(places) != len(costs):
        raise InputError(f"{len(costs)} pictures, but {len(places)} image tokens after the chat template")
    repeats = np.ones(len(ids), dtype=np.int64)
    repeats[places] = costs
    return np.repeat(ids, repeats), np.repeat(labels, repeats)
