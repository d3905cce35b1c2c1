"""Braces in a path choose tars of a set, and what they cannot choose is one line."""

from __future__ import annotations

import pickle

import pytest

from data_pipeline.config import SourceConfig
from data_pipeline.index import ShardIndex
from data_pipeline.source import open_index, split_path
from models.common.errors import InputError
from tests.support.shards import write_set


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    return write_set(tmp_path_factory.mktemp("sets") / "set", [3, 1, 4, 2])


def opened(whole: ShardIndex, name: str) -> ShardIndex:
    return open_index(SourceConfig(path=f"{whole.folder}/{name}"))


@pytest.mark.parametrize(
    ("name", "samples"),
    [
        ("shard-{000001..000002}.tar", [3, 4, 5, 6, 7]),
        ("shard-00000{3,0}.tar", [8, 9, 0, 1, 2]),
        ("shard-000002.tar", [4, 5, 6, 7]),
        ("shard-{000000..000003}.tar", list(range(10))),
    ],
)
def test_a_selection_is_those_samples_in_that_order(whole: ShardIndex, name: str, samples: list[int]) -> None:
    index = pickle.loads(pickle.dumps(opened(whole, name)))
    assert len(index) == len(samples) == sum(index.shard_sizes)
    assert [index.read(n) for n in range(len(index))] == [whole.read(n) for n in samples]
    assert [index.entry(n) for n in range(len(index))] == [whole.entry(n) for n in samples]
    with pytest.raises(IndexError):
        index.read(len(index))


def test_the_fingerprint_follows_the_selection(whole: ShardIndex) -> None:
    names = [
        "shard-{000000..000001}.tar",
        "shard-{000001..000000}.tar",
        "shard-{000001..000002}.tar",
        "shard-000001.tar",
    ]
    assert len({opened(whole, name).fingerprint for name in names} | {whole.fingerprint}) == 5
    assert opened(whole, "shard-{000000..000003}.tar").fingerprint == whole.fingerprint


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("shard-{000002..000005}.tar", "lacks shard-000004.tar and 1 more of the 4"),
        ("other.tar", "lacks other.tar of the 1"),
        ("shard-{000000,000000}.tar", "named twice"),
        ("shard-{000000..000001.tar", "lacks|braces"),
        ("{a,b}/shard-000000.tar", "one set"),
        ("shard-{0..9}", "one set"),
        ("shard-{0..99999999}.tar", "more than 1000000"),
    ],
)
def test_what_braces_cannot_choose_is_one_line(whole: ShardIndex, name: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        opened(whole, name)
    assert "\n" not in str(caught.value)


def test_paths_without_tars_are_sets() -> None:
    assert split_path("data/set") == ("data/set", None)
    assert split_path("https://host/set") == ("https://host/set", None)
    assert split_path("a.tar") == (".", ("a.tar",))
    assert split_path("s3://bucket/x/t-{08..10}.tar") == ("s3://bucket/x", ("t-08.tar", "t-09.tar", "t-10.tar"))
