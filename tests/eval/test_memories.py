"""What need not be read again: features of images and beginnings of chats, by content, in so many bytes."""

from __future__ import annotations

import pytest
import torch

from eval.kept_chats import KeptChats
from eval.kv_cache import DynamicKVCache, KVRow
from eval.lru_cache import LruCache
from eval.pixels import NO_PIXELS, Pixels
from eval.predictor import Predictor, Query, Turn
from eval.prompts import Prompt
from tests.support.bundles import image, make_bundle

IMAGE = 1000
"""An id that stands for an image."""


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    return Predictor.open(make_bundle(tmp_path_factory.mktemp("bundle")), device="cpu")


def test_what_was_used_longest_ago_goes_first() -> None:
    kept: LruCache[str, str] = LruCache(3 * 40)
    for key in ("a", "b", "c"):
        kept.keep(key, key, 40)
    assert kept.find("a") == "a"
    kept.keep("d", "d", 40)
    assert kept.find("b") is None
    assert [kept.find(key) for key in ("a", "c", "d")] == ["a", "c", "d"]
    assert (kept.num_queries, kept.num_hits, kept.num_bytes) == (5, 4, 120)
    kept.keep("d", "larger", 80)
    assert kept.num_bytes == 120, "another value in the place of the old one, and another one gone"
    kept.keep("large", "large", 121)
    assert kept.find("large") is None
    kept.clear()
    assert kept.num_bytes == 0


def test_features_that_are_kept_are_a_copy_of_ones_own(predictor: Predictor) -> None:
    """A view of a whole group's features would hold all of their memory."""
    reader = predictor.make_reader(1 << 20, 0)
    prompts = [predictor.prompt(Query((image(shape),), (Turn("user", "What?"),))) for shape in ("circle", "square")]
    reader.read(prompts)
    assert reader.features is not None
    for asked in prompts:
        features_PD = reader.features.find(asked.pixels.digests[0])
        assert features_PD is not None
        assert features_PD.untyped_storage().nbytes() == features_PD.nbytes
    assert reader.features.num_bytes == 2 * features_PD.nbytes


def test_images_are_told_apart_by_their_pixels(predictor: Predictor) -> None:
    turn = (Turn("user", "What?"),)
    queries = [Query((image("circle"), image("square")), turn), Query((image("square"),), turn), Query((), turn)]
    both, square, none = (predictor.prompt(query).pixels.digests for query in queries)
    assert both[1:] == square
    assert both[0] != square[0]
    assert none == ()


def row_of(predictor: Predictor, num_tokens: int) -> KVRow:
    """Keys and values of a row; what they are does not matter."""
    cache = DynamicKVCache(predictor.model)
    ids = torch.ones(1, num_tokens, dtype=torch.long)
    with torch.no_grad():
        cache.read({"input_ids": ids, "attention_mask": ids})
    return cache.copy_row(0)


def prompt(*ids: int, color: float | None = None) -> Prompt:
    return Prompt(list(ids), NO_PIXELS if color is None else Pixels({"pixel_values": torch.full((1, 3, 2, 2), color)}))


def keep(chats: KeptChats, predictor: Predictor, asked: Prompt, answer: list[int]) -> None:
    """As a row leaves: its last token has not been read."""
    chats.keep(asked, answer, row_of(predictor, len(asked.ids) + len(answer) - 1))


def test_the_longest_beginning_is_found_and_one_token_is_left_to_read(predictor: Predictor) -> None:
    chats = KeptChats(1 << 20, IMAGE)
    keep(chats, predictor, prompt(1, 2, 3), [4, 5])
    keep(chats, predictor, prompt(1, 2, 9, 9), [8])
    found = [chats.find(prompt(*ids)) for ids in ((1, 2, 3, 4, 5, 6), (1, 2, 3), (1, 2, 9, 9, 7), (1, 7, 7, 7), (7, 7))]
    assert [None if each is None else each.length for each in found] == [4, 2, 4, None, None]
    assert (chats.num_queries, chats.num_hits) == (5, 3)


def test_a_beginning_counts_only_with_the_same_images_and_none_behind_it(predictor: Predictor) -> None:
    chats = KeptChats(1 << 20, IMAGE)
    keep(chats, predictor, prompt(1, IMAGE, 2, color=0.5), [4])
    assert chats.find(prompt(1, IMAGE, 2, 4, 5, color=0.5)) is not None
    assert chats.find(prompt(1, IMAGE, 2, 4, 5, color=0.6)) is None
    assert chats.find(prompt(1, IMAGE, 2, 4, IMAGE, color=0.5)) is None
    assert chats.find(prompt(1, 2, 4)) is None


def test_a_chat_takes_the_place_of_its_beginning_and_the_one_used_longest_ago_goes(predictor: Predictor) -> None:
    one = row_of(predictor, 10).num_bytes
    chats = KeptChats(3 * one, IMAGE)
    keep(chats, predictor, prompt(*range(8)), [20, 21, 22])
    keep(chats, predictor, prompt(*range(8), 20, 21), [30])
    assert chats.num_bytes == one, "the first is a beginning of the second"
    keep(chats, predictor, prompt(*range(50, 60)), [1])
    keep(chats, predictor, prompt(*range(60, 70)), [1])
    assert chats.find(prompt(*range(8), 20, 21, 40)) is not None
    keep(chats, predictor, prompt(*range(70, 80)), [1])
    assert chats.num_bytes == 3 * one
    assert chats.find(prompt(*range(50, 60), 1)) is None
    keep(chats, predictor, prompt(*range(100, 140)), [1])
    assert chats.find(prompt(*range(100, 140), 1)) is None, "larger than all the room"
