"""What micro-batches and rows hold, as the counts from which FLOPs and memory follow."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data_pipeline.batch import Batch
from data_pipeline.sample import Row
from models.shapes import Counts
from models.spec import IGNORE_INDEX


def count(batches: Sequence[Batch]) -> Counts:
    """The counts of micro-batches. Positions start at 0 in every sample, so their sum gives the pairs."""
    total = Counts(0, 0, 0, 0, 0)
    for batch in batches:
        pairs_BL = (batch.tokens.position_ids_BL + 1) * (batch.tokens.segment_ids_BL > 0)
        target_pairs = int(pairs_BL[batch.tokens.targets_BL != IGNORE_INDEX].sum())
        tiles = batch.images.tiles_TSSC.shape[0]
        plan = batch.images.plan if tiles else None
        of_images = (0, 0) if plan is None else plan.attention_pairs
        total += Counts(batch.num_tokens, batch.num_targets, tiles, int(pairs_BL.sum()), target_pairs, *of_images)
    return total


def count_rows(rows: Sequence[Row]) -> Counts:
    """The counts of rows, before they are collated; nothing is read from a device."""
    total = Counts(0, 0, 0, 0, 0)
    for sample in (sample for row in rows for sample in row):
        # A target at place i of the labels is predicted at i - 1, which sees i positions.
        places = np.flatnonzero(sample.labels[1:] != IGNORE_INDEX) + 1
        length = sample.num_tokens
        pairs = length * (length + 1) // 2
        total += Counts(length, len(places), len(sample.tiles), pairs, int(places.sum()), *sample.patch_pairs)
    return total
