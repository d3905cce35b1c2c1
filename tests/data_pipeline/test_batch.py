"""Targets are the next token of the same sample, and nothing else."""

from __future__ import annotations

import numpy as np

from data_pipeline.batch import collate
from data_pipeline.sample import Encoded
from models.spec import IGNORE_INDEX, TextSpec
from tests.support.samples import ref

TEXT = TextSpec(max_length=64, image_token_id=90, pad_token_id=0, vocab_size=100)


def sample(key: str, ids: list[int], num_masked: int, num_tiles: int = 0) -> Encoded:
    labels = [IGNORE_INDEX] * num_masked + ids[num_masked:]
    tiles = np.full((num_tiles, 2, 2, 3), ids[0], dtype=np.uint8)
    return Encoded(ref(key=key), np.array(ids, np.int32), np.array(labels, np.int32), tiles)


def test_packed_rows_keep_samples_apart() -> None:
    a, b, c = sample("a", [1, 2, 3], 1, 1), sample("b", [4, 5, 0, 6], 0, 2), sample("c", [7, 8], 1)
    batch = collate([(a, b), (c,), ()], TEXT)
    ignore = IGNORE_INDEX
    assert batch.tokens.input_ids_BL.tolist() == [[1, 2, 3, 4, 5, 0, 6], [7, 8, 0, 0, 0, 0, 0], [0] * 7]
    assert batch.tokens.targets_BL.tolist()[0] == [2, 3, ignore, 5, 0, 6, ignore]
    assert batch.tokens.targets_BL.tolist()[1] == [8, *[ignore] * 6]
    assert batch.tokens.position_ids_BL.tolist()[0] == [0, 1, 2, 0, 1, 2, 3]
    assert batch.tokens.segment_ids_BL.tolist() == [[1, 1, 1, 2, 2, 2, 2], [1, 1, 0, 0, 0, 0, 0], [0] * 7]
    assert batch.images.tiles_TSSC[:, 0, 0, 0].tolist() == [1, 4, 4]
    assert batch.keys == (("a", "b"), ("c",), ())
    assert (batch.num_targets, batch.num_tokens, batch.num_samples) == (6, 9, 3)
    assert batch.num_targets == a.num_targets + b.num_targets + c.num_targets


def test_a_micro_batch_of_slots_that_ran_out_is_one_position_of_padding() -> None:
    batch = collate([(), ()], TEXT)
    assert batch.tokens.input_ids_BL.tolist() == [[0], [0]]
    assert (batch.num_targets, batch.num_tokens, batch.num_samples, len(batch.images.tiles_TSSC)) == (0, 0, 0, 0)


def test_a_batch_says_where_everything_stands() -> None:
    a, b, c = sample("a", [90, 2, 3], 1, 1), sample("b", [4, 5, 0, 6], 0, 2), sample("c", [7, 90], 1)
    batch = collate([(a,), (), (b, c)], TEXT)
    assert batch.layout.real_N.tolist() == [0, 1, 2, *range(12, 18)]
    assert batch.layout.segment_starts_G1.tolist() == [0, 3, 7, 9]
    assert batch.layout.segment_lengths == (3, 4, 2)
    assert batch.layout.image_I.tolist() == [0, 8]
    flat = batch.layout.without_padding(batch.tokens.targets_BL)
    assert batch.layout.supervised_K.tolist() == (flat != IGNORE_INDEX).nonzero().flatten().tolist()
    assert batch.layout.target_rows_K.tolist() == [0, 0, 2, 2, 2, 2]
    assert batch.images.tile_rows_T.tolist() == [0, 2, 2]
    empty = collate([(), ()], TEXT).layout
    assert (empty.real_N.tolist(), empty.segment_lengths, empty.supervised_K.tolist()) == (
        [0],
        (1,),
        [],
    )
