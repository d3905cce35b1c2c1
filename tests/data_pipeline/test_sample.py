"""What a sample says of itself."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from data_pipeline.sample import BadSample, Encoded
from models.spec import IGNORE_INDEX
from tests.support.samples import ref

NO = IGNORE_INDEX


def encoded(labels: list[int]) -> Encoded:
    ids = np.arange(len(labels), dtype=np.int32)
    return Encoded(ref(4, "k"), ids, np.array(labels, np.int32), np.zeros((0, 1, 1, 3), np.uint8))


@pytest.mark.parametrize(
    ("labels", "num_targets"), [([NO, 1, 2], 2), ([0, 1, 2], 2), ([0, NO, NO], 0), ([5], 0), ([NO, NO, 2], 1)]
)
def test_the_first_token_is_never_a_target(labels: list[int], num_targets: int) -> None:
    sample = encoded(labels)
    assert (sample.num_tokens, sample.num_targets) == (len(labels), num_targets)


def test_what_came_of_a_reference_has_its_names() -> None:
    bad = BadSample(ref(4, "k"), "broken")
    for found in (encoded([1]), bad):
        assert (found.shard, found.key) == ("s.tar", "k")
    assert str(bad) == "s.tar k: broken"


def test_references_are_equal_by_value_and_survive_a_worker() -> None:
    assert pickle.loads(pickle.dumps(ref(4, "k"))) == ref(4, "k")
    assert len({ref(4), ref(4), ref(5), ref(4, slot=1)}) == 3
