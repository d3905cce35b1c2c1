"""The worker's function: one reference in, tokens and pixels or a reason out, the same every time."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.augment import Augmenter
from data_pipeline.config import ChatmlTemplate, ImageAugment
from data_pipeline.encode import Encoder, ImageHandling, expand_images
from data_pipeline.index import ShardIndex
from data_pipeline.index_build import build_index
from data_pipeline.record import read_record
from data_pipeline.sample import BadSample, Encoded, SampleRef
from data_pipeline.templates import build_template
from data_pipeline.tokens import Segment, Tokens
from models.common.errors import InputError
from tests.support.shards import IMAGE, caption_sample, image_bytes, tiny_tokenizer, write_tar

KEYS = ["good", "cut", "mute", "long"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    folder = tmp_path_factory.mktemp("set")
    files = [
        caption_sample(0),
        {"png": image_bytes()[:200], "txt": b"a"},
        {"png": image_bytes()},
        caption_sample(3, words=99),
    ]
    write_tar(folder / "a.tar", zip(KEYS, files, strict=True))
    build_index(folder)
    tokens = Tokens.of(tiny_tokenizer())
    return Encoder([ShardIndex.open(folder)], build_template(ChatmlTemplate(), tokens), tokens, IMAGE, max_length=256)


def ref(key: str, *, n: int = 0) -> SampleRef:
    return SampleRef(0, n, 0, KEYS.index(key), "a.tar", key)


def test_a_sample_is_its_tokens_with_four_for_its_image(encoder: Encoder) -> None:
    found = encoder(ref("good"))
    assert isinstance(found, Encoded)
    assert found.ref == ref("good")
    assert np.count_nonzero(found.input_ids == encoder.tokens.image_token_id) == 4
    assert (found.tiles.shape, found.image_sizes, found.num_shrunk) == ((1, 16, 16, 3), ((16, 20),), 0)
    assert found.num_targets > 0


@pytest.mark.parametrize(
    ("key", "kind", "reason"),
    [("cut", "bad", "cannot be decoded"), ("mute", "bad", "no text"), ("long", "too_long", "more than max_length 256")],
)
def test_what_cannot_be_used_comes_back_with_the_reason(encoder: Encoder, key: str, kind: str, reason: str) -> None:
    found = encoder(ref(key))
    assert isinstance(found, BadSample)
    assert (found.ref, found.kind) == (ref(key), kind)
    assert reason in found.reason


def test_a_worker_gives_what_the_main_process_gives(encoder: Encoder) -> None:
    here, there = encoder(ref("good")), pickle.loads(pickle.dumps(encoder))(ref("good"))
    assert isinstance(here, Encoded)
    assert np.array_equal(here.input_ids, there.input_ids)
    assert np.array_equal(here.tiles, there.tiles)


def test_augmented_images_follow_the_draw_and_nothing_else(encoder: Encoder) -> None:
    changing = replace(encoder, handling=ImageHandling(augmenter=Augmenter(ImageAugment(crop_area=(0.3, 0.5)), 1)))
    first, again, later = (changing(ref("good", n=n)) for n in (0, 0, 1))
    assert isinstance(first, Encoded)
    assert np.array_equal(first.tiles, again.tiles)  # type: ignore[union-attr]
    assert not np.array_equal(first.tiles, later.tiles)  # type: ignore[union-attr]
    record = read_record(encoder.indexes[0].read(0))
    assert np.array_equal(changing.encode_record(record).tiles, encoder.encode_record(record).tiles)


def test_a_decoder_keeps_what_the_smallest_cut_needs() -> None:
    augmenter = Augmenter(ImageAugment(crop_area=(0.25, 1.0)), 0)
    assert ImageHandling().smallest_side(336) is None
    assert ImageHandling(augmenter=augmenter).smallest_side(336) is None
    assert ImageHandling(scaled_jpeg=True).smallest_side(336) == 336
    both = ImageHandling(scaled_jpeg=True, augmenter=augmenter).smallest_side(336)
    assert both == math.ceil(336 / augmenter.smallest_side_share) > 2 * 336


def test_each_image_token_is_repeated_as_often_as_its_image_costs() -> None:
    ids, labels = np.array([1, 9, 2, 9, 3], np.int32), np.array([-100, -100, 2, -100, 3], np.int32)
    found_ids, found_labels = expand_images(ids, labels, 9, [3, 1])
    assert found_ids.tolist() == [1, 9, 9, 9, 2, 9, 3]
    assert found_labels.tolist() == [-100, -100, -100, -100, 2, -100, 3]
    with pytest.raises(InputError, match="1 images, but 2 image tokens"):
        expand_images(ids, labels, 9, [3])


def test_opening_an_encoder_reads_no_tar(encoder: Encoder, tmp_path: Path) -> None:
    index = encoder.indexes[0]
    (tmp_path / "index").mkdir()
    for file in (index.folder / "index").iterdir():
        (tmp_path / "index" / file.name).write_bytes(file.read_bytes())
    found = replace(encoder, indexes=[ShardIndex.open(tmp_path)])(ref("good"))
    assert isinstance(found, BadSample)
    assert "a.tar: cannot be opened" in found.reason


class Raising:
    """A template that raises what no template should."""

    stop = ""

    def segments(self, turns: object) -> list[Segment]:
        raise TypeError("unusable: half of a pair")

    def jinja(self) -> str:
        return ""


def test_whatever_a_part_raises_on_one_sample_costs_that_sample(encoder: Encoder) -> None:
    found = replace(encoder, template=Raising())(ref("good"))
    assert isinstance(found, BadSample)
    assert found.reason == "TypeError: unusable: half of a pair"
