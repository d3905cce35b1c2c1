"""Augmented images depend on seed, slot and draw alone, and change no more than they may."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError

from data_pipeline.augment import Augmenter, uniform
from data_pipeline.config import DataConfig, ImageAugment
from tests.data_pipeline.test_stream import config, open_rank
from tests.support.samples import ref
from tests.support.shards import write_set

ALL = ImageAugment(crop_area=(0.4, 0.9), colour=0.2, flip=0.5)
Tiles = dict[tuple[int, int], NDArray[np.uint8]]


def noise(width: int = 60, height: int = 40) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def tiles(data: DataConfig, world: int = 1, **values: int) -> Tiles:
    """By draw, all tiles of two epochs."""
    found: Tiles = {}
    for rank in range(world):
        stream = open_rank(data, rank, world, epochs=2, **values)
        while not stream.exhausted:
            rows = stream.next_rows()
            found |= {(sample.ref.slot, sample.ref.n): sample.tiles for row in rows for sample in row}
        stream.close()
    return found


def same(one: Tiles, other: Tiles) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[draw], other[draw]) for draw in one)


def test_ranks_workers_and_resumption_change_nothing(tmp_path: Path) -> None:
    write_set(tmp_path / "set", [7, 4])
    data = config(tmp_path / "set", augment=ALL)
    alone = tiles(data)
    assert len(alone) == 22
    assert same(tiles(data, world=4), alone)
    assert same(tiles(data.model_copy(update={"num_workers": 2})), alone)
    stream = open_rank(data, epochs=2)
    stream.next_rows()
    resumed = open_rank(data, epochs=2)
    resumed.load_state_dict(stream.state_dict())
    for row in resumed.next_rows():
        assert all(np.array_equal(sample.tiles, alone[sample.ref.slot, sample.ref.n]) for sample in row)


def test_another_seed_and_another_epoch_give_another_image() -> None:
    augmenter, image = Augmenter(ALL, 3), noise()
    images = [augmenter(image, ref(n, slot=slot), place) for slot in (0, 1) for n in (0, 1) for place in (0, 1)]
    images.append(Augmenter(ALL, 4)(image, ref(), 0))
    assert len({changed.tobytes() for changed in images}) == 9
    assert augmenter(image, ref(), 0).tobytes() == images[0].tobytes()


def test_the_defaults_change_nothing() -> None:
    assert Augmenter(ImageAugment(), 0)(noise(), ref(), 0).tobytes() == noise().tobytes()


def test_a_flip_is_a_mirror_image() -> None:
    always = Augmenter(ImageAugment(flip=1.0), 0)(noise(), ref(), 0)
    assert np.array_equal(np.asarray(always), np.asarray(noise())[:, ::-1])
    half = Augmenter(ImageAugment(flip=0.5), 0)
    num_flipped = sum(half(noise(), ref(n), 0).tobytes() != noise().tobytes() for n in range(400))
    assert 160 < num_flipped < 240  # four standard deviations


@settings(deadline=None, max_examples=60)
@given(
    size=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    areas=st.tuples(st.floats(0.05, 1), st.floats(0.05, 1)).map(sorted),
    n=st.integers(0, 10**6),
)
def test_a_cut_keeps_the_share_it_should(size: tuple[int, int], areas: list[float], n: int) -> None:
    augmenter = Augmenter(ImageAugment(crop_area=(areas[0], areas[1])), 0)
    width, height = augmenter(Image.new("RGB", size), ref(n), 0).size
    assert 1 <= width <= size[0]
    assert 1 <= height <= size[1]
    assert min(width, height) >= min(size) * augmenter.smallest_side_share - 0.5
    slack = 0.5 * (size[0] + size[1]) + 0.25  # each side is rounded to whole pixels, and is at least one
    assert areas[0] * size[0] * size[1] - slack <= width * height <= areas[1] * size[0] * size[1] + slack + 1


def test_numbers_are_uniform_and_those_of_any_machine() -> None:
    numbers = np.array([uniform(8, 0, 1, n) for n in range(500)])
    assert abs(numbers.mean() - 0.5) < 0.02
    assert 0 <= numbers.min() <= numbers.max() < 1
    assert uniform(2, 3, 1, 2, 0) == pytest.approx(GOLDEN, abs=0)


GOLDEN = [0.6044671025629265, 0.05605748948753653]


def test_a_recipe_spells_it_in_plain_yaml() -> None:
    assert ImageAugment.model_validate({"kind": "picture", "crop_area": [0.4, 0.9], "colour": 0.2, "flip": 0.5}) == ALL
    for areas in ([0.9, 0.4], [0, 1], [0.5, 1.5]):
        with pytest.raises(ValidationError, match="smallest and the largest share"):
            ImageAugment.model_validate({"crop_area": areas})
