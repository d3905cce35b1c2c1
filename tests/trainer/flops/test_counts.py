"""What rows hold is the same counted before collating, after it, and by lengths alone."""

from __future__ import annotations

import numpy as np

from data_pipeline.batch import collate
from data_pipeline.sample import Encoded
from models.shapes import Counts, PartFlops
from models.spec import IGNORE_INDEX, TextSpec
from tests.support.samples import ref
from trainer.flops.counts import count, count_rows

TEXT = TextSpec(max_length=64, image_token_id=9, pad_token_id=0, vocab_size=10)


def sample(length: int, num_targets: int, num_tiles: int) -> Encoded:
    """Its last `num_targets` tokens are targets."""
    ids = np.ones(length, np.int32)
    labels = np.where(np.arange(length) < length - num_targets, IGNORE_INDEX, ids)
    return Encoded(ref(length), ids, labels, np.zeros((num_tiles, 4, 4, 3), np.uint8))


def test_rows_batches_and_lengths_agree() -> None:
    """A packed row, a short one and an empty one. A target at place i is predicted at i - 1, which sees i positions."""
    rows = [(sample(7, 3, 1), sample(5, 2, 0)), (sample(4, 1, 2),), ()]
    found = count_rows(rows)
    assert found == count([collate(rows, TEXT)])
    assert (found.tokens, found.targets, found.tiles) == (16, 6, 3)
    assert found.causal_pairs == 28 + 15 + 10
    assert found.target_pairs == (4 + 5 + 6) + (3 + 4) + 3
    by_length = Counts.of_sample(7, 3, 1)
    assert (by_length.causal_pairs, by_length.target_pairs) == (28, 5 + 6 + 7)  # predicted at the targets' own places


def test_counts_and_flops_add_up() -> None:
    one = Counts.of_sample(7, 3, 1)
    assert one + one == one.times(2)
    assert (PartFlops(1.0, 2.0, 3.0) + PartFlops(1.0)).total == 7.0
