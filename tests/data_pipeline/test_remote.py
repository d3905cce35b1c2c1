"""A set behind a server gives what the set on disk gives; a failing server is tried again, then named."""

from __future__ import annotations

import errno
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline import download, remote
from data_pipeline.config import SourceConfig
from data_pipeline.source import open_index
from data_pipeline.tar_bytes import DamagedSampleError
from models.common.errors import AwayError, InputError
from tests.support.shard_servers import Flaky
from tests.support.shards import write_set


def test_equals_the_set_on_disk_and_copies_once(served: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = open_index(SourceConfig(path=str(tmp_path / "set")))
    source = SourceConfig(path=served, cache=str(tmp_path / "cache"))
    index = open_index(source)
    monkeypatch.setattr(Flaky, "failures", 2)  # of each tar, a refusal and a short answer come first
    for opened in (index, pickle.loads(pickle.dumps(index)), open_index(source)):
        assert [opened.read(n) for n in range(9)] == [local.read(n) for n in range(9)]
    assert opened.fingerprint == local.fingerprint
    assert {path: count for path, count in Flaky.seen.items() if path.endswith(".tar")} == {
        f"/set/{name}": 3 for name in local.shard_names
    }


def test_some_tars_of_a_set_at_an_address(served: str, tmp_path: Path) -> None:
    source = SourceConfig(path=f"{served}/shard-{{000001..000002}}.tar", cache=str(tmp_path / "cache"))
    local = open_index(SourceConfig(path=f"{tmp_path}/set/shard-{{000001..000002}}.tar"))
    index = open_index(source)
    assert index.fingerprint == local.fingerprint
    assert [index.read(n) for n in range(6)] == [local.read(n) for n in range(6)]
    assert "/set/shard-000000.tar" not in Flaky.seen


@pytest.mark.parametrize("fault", ["chunk", "status", "header", "reset"])
def test_a_server_that_breaks_its_answer_is_asked_again(
    served: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    index = open_index(SourceConfig(path=served, cache=str(tmp_path / "cache")))
    monkeypatch.setattr(Flaky, "failures", 2)
    monkeypatch.setattr(Flaky, "fault", fault)
    assert index.read(0)["txt"].startswith(b"caption 0")
    assert Flaky.seen["/set/shard-000000.tar"] == 3
    monkeypatch.setattr(Flaky, "failures", 99)
    monkeypatch.setattr(Flaky, "only", ".tar")
    with pytest.raises(InputError, match=r"shard-000001\.tar cannot be copied after 4 tries: \S"):
        index.read(3)


def test_what_is_not_there_is_not_asked_for_again(served: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"meta\.json cannot be copied: HTTP Error 404"):
        open_index(SourceConfig(path=f"{served}/none", cache=str(tmp_path / "cache")))
    assert [count for path, count in Flaky.seen.items() if "none" in path] == [1]
    with pytest.raises(InputError, match=r"xyz://a/.* cannot be copied: Protocol not known"):
        open_index(SourceConfig(path="xyz://a", cache=str(tmp_path / "cache")))


def test_the_cache_is_bounded(served: str, tmp_path: Path) -> None:
    index = open_index(SourceConfig(path=served, cache=str(tmp_path / "cache"), cache_gb=2.5e-5))
    for n in range(9):
        index.read(n)
    assert sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.tar")) <= 25_000


def test_a_file_that_keeps_failing_is_named(served: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = open_index(SourceConfig(path=served, cache=str(tmp_path / "cache")))
    monkeypatch.setattr(Flaky, "failures", 99)
    monkeypatch.setattr(Flaky, "only", ".tar")
    with pytest.raises(InputError, match=r"shard-000001\.tar cannot be copied after 4 tries"):
        index.read(3)
    with pytest.raises(InputError, match=r"meta\.json cannot be copied"):
        open_index(SourceConfig(path=f"{served}/none", cache=str(tmp_path / "cache")))
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.suffix == ".tar"]


@pytest.mark.parametrize("fault", ["", "reset", "status"])
def test_a_server_that_is_away_is_waited_for_and_blames_no_sample(
    served: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    index = open_index(SourceConfig(path=served, cache=str(tmp_path / "cache")))
    monkeypatch.setattr(Flaky, "fault", fault)
    monkeypatch.setattr(Flaky, "failures", 12)  # three times as many as a file that is broken gets
    assert index.read(0)["txt"].startswith(b"caption 0")
    assert Flaky.seen["/set/shard-000000.tar"] == 13
    monkeypatch.setattr(Flaky, "failures", 10_000)
    monkeypatch.setattr(remote, "AWAY_LIMIT_MINUTES", 0.001)
    with pytest.raises(
        AwayError, match=r"shard-000001\.tar has been away for 0 minutes \(\S.*\); start the same command"
    ):
        index.read(3)


def test_a_set_that_was_here_is_waited_for_at_the_start_and_a_wrong_address_is_not(
    served: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = SourceConfig(path=served, cache=str(tmp_path / "cache"))
    monkeypatch.setattr(Flaky, "failures", 5)
    with pytest.raises(InputError, match=r"meta\.json cannot be copied after 4 tries"):
        open_index(source)
    monkeypatch.setattr(Flaky, "failures", 0)
    open_index(source)
    monkeypatch.setattr(Flaky, "failures", Flaky.seen["/set/index/meta.json"] + 9)
    assert len(open_index(source)) == 9
    monkeypatch.setattr(Flaky, "failures", 10_000)
    monkeypatch.setattr(remote, "AWAY_LIMIT_MINUTES", 0.001)
    with pytest.raises(AwayError, match=r"meta\.json has been away"):
        open_index(source)


def test_a_full_disk_under_the_cache_blames_no_sample(
    served: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = open_index(SourceConfig(path=served, cache=str(tmp_path / "cache")))

    def fill(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(download, "_download", fill)
    with pytest.raises(AwayError, match=r"the cache of http.*: No space left on device; make room"):
        index.read(0)


def test_a_set_made_anew_replaces_its_copies(served: str, tmp_path: Path) -> None:
    source = SourceConfig(path=served, cache=str(tmp_path / "cache"))
    old = open_index(source)
    old.read(0)
    write_set(tmp_path / "set", [2, 2], words=5)
    new = open_index(source)
    assert new.shard_sizes == [2, 2, 4]
    assert b"word word word" in new.read(0)["txt"]


HOSTILE: dict[str, tuple[str, Any]] = {
    "absolute": ("shards.0.name", "/etc/cron.d/x.tar"),
    "up": ("shards.0.name", "../../x.tar"),
    "no tar": ("shards.0.name", "sitecustomize.py"),
    "half a character": ("shards.0.name", "\ud83d.tar"),
    "dots": ("shards.0.name", ".."),
    "twice": ("shards.1.name", "shard-000000.tar"),
    "negative": ("shards.0.num_bytes", -1),
    "huge tar": ("shards.0.num_bytes", 10**15),
    "no number": ("shards.0.num_samples", "3"),
    "another array": ("array_bytes", {"samples": 1, "members": 1, "keys": 1, "../../sitecustomize": 1}),
    "path as array": ("array_bytes", {"/tmp/x": 1}),
    "huge array": ("array_bytes.keys", 10**15),
    "list": ("shards", {}),
    "no fingerprint": ("fingerprint", None),
    "deep": ("extra", "DEEP"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_a_server_names_stays_in_the_cache(served: str, tmp_path: Path, case: str) -> None:
    file = tmp_path / "set" / "index" / "meta.json"
    meta = json.loads(file.read_text())
    place, value = HOSTILE[case]
    *parents, last = place.split(".")
    node: Any = meta
    for key in parents:
        node = node[int(key) if key.isdigit() else key]
    node[last] = value
    text = json.dumps(meta).replace('"DEEP"', "[" * 100_000 + "]" * 100_000)
    file.write_text(text)
    before = sorted(path for path in tmp_path.rglob("*") if "cache" not in path.parts)
    with pytest.raises(InputError, match=r"meta\.json|raise cache_gb") as caught:
        open_index(SourceConfig(path=served, cache=str(tmp_path / "cache"))).read(0)
    assert "\n" not in str(caught.value)
    assert sorted(path for path in tmp_path.rglob("*") if "cache" not in path.parts) == before
    assert not list((tmp_path / "cache").rglob("*.tar"))


@pytest.mark.parametrize(
    ("array", "field"), [("samples", "first_member"), ("members", "size"), ("members", "extension")]
)
def test_an_index_that_points_elsewhere_costs_its_samples(tmp_path: Path, array: str, field: str) -> None:
    write_set(tmp_path / "set", [3])
    file = tmp_path / "set" / "index" / f"{array}.npy"
    values = np.load(file)
    values[field] = np.iinfo(values.dtype[field]).max
    np.save(file, values)
    index = open_index(SourceConfig(path=str(tmp_path / "set")))
    with pytest.raises(DamagedSampleError, match=r"shard-000000\.tar: .*index it again"):
        index.read(0)
