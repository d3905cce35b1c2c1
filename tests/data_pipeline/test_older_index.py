"""An index that an older version wrote opens, and finds the samples that one made today finds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from data_pipeline.index import ShardIndex
from data_pipeline.index_build import build_index
from tests.support.paths import REPOSITORY

SET = REPOSITORY / "tests/support/fixtures/run_0_1/shards"
"""Written by version 0.1."""


@pytest.mark.parametrize("without", [(), ("array_bytes",)], ids=["0.1", "before sizes of arrays were kept"])
def test_samples_of_an_older_index_are_those_of_a_new_one(tmp_path: Path, without: tuple[str, ...]) -> None:
    older, newer = (Path(shutil.copytree(SET, tmp_path / name)) for name in ("older", "newer"))
    meta = json.loads((older / "index/meta.json").read_text())
    (older / "index/meta.json").write_text(json.dumps({key: meta[key] for key in meta if key not in without}))
    shutil.rmtree(newer / "index")
    build_index(newer)
    found, expected = ShardIndex.open(older), ShardIndex.open(newer)
    assert len(found) == len(expected) > 0
    assert found.fingerprint == expected.fingerprint
    for sample in range(len(found)):
        assert found.key_of(sample) == expected.key_of(sample)
        assert found.read(sample) == expected.read(sample)
