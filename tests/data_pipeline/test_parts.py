"""Where tars do not fit the cache, a rank takes from each what it needs, and learns when a server cannot give that."""

from __future__ import annotations

import pickle
import re
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from data_pipeline import remote
from data_pipeline.config import SourceConfig
from data_pipeline.index import ShardIndex
from data_pipeline.source import open_index
from data_pipeline.tar_bytes import DamagedSampleError
from models.common.errors import AwayError
from tests.support.shards import write_set
from tests.support.streams import config, keys_left, open_rank

NUM_TARS = 20


class Ranges(SimpleHTTPRequestHandler):
    """Serves parts of files where it is asked for them."""

    gives_parts = True
    fails = 0
    """Requests for parts that fail before one does not."""
    sent: dict[str, int]
    """Bytes by what was asked for: whole tars, or parts of them."""

    def do_GET(self) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        content = Path(self.translate_path(self.path)).read_bytes()
        is_part = asked is not None and self.gives_parts
        if is_part and Ranges.fails:
            Ranges.fails -= 1
            self.send_error(503)
            return
        if is_part:
            assert asked is not None
            content = content[int(asked[1]) : int(asked[2]) + 1]
        kind = "parts" if is_part else "whole" if self.path.endswith(".tar") else "index"
        self.sent[kind] = self.sent.get(kind, 0) + len(content)
        self.send_response(206 if is_part else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_arguments: Any) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    write_set(tmp_path / "set", [3] * NUM_TARS)
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(Ranges, "sent", {}, raising=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Ranges, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/set"
    server.shutdown()
    server.server_close()


def source(url: str, cache: Path, cache_gb: float) -> SourceConfig:
    return SourceConfig(path=url, cache=str(cache), cache_gb=cache_gb)


def some_tars(tmp_path: Path, number: float) -> float:
    return number * (tmp_path / "set" / "shard-000000.tar").stat().st_size / 1e9


def test_a_rank_whose_tars_do_not_fit_reads_each_sample_once(served: str, tmp_path: Path) -> None:
    local = keys_left(open_rank(config(tmp_path / "set", shuffle_window=9), num_slots=8))
    narrow = source(served, tmp_path / "cache", some_tars(tmp_path, 4))
    assert keys_left(open_rank(config(narrow, shuffle_window=9), num_slots=8)) == local
    assert "whole" not in Ranges.sent
    assert Ranges.sent["parts"] < sum(path.stat().st_size for path in (tmp_path / "set").glob("*.tar"))
    assert not list(tmp_path.glob("cache/*/*.tar"))
    assert not list(tmp_path.glob("cache/*/.*.part"))


def test_a_cache_that_holds_them_copies_each_tar_once(served: str, tmp_path: Path) -> None:
    wide = source(served, tmp_path / "cache", 1.0)
    assert len(keys_left(open_rank(config(wide, shuffle_window=9), num_slots=8))) == 3 * NUM_TARS
    assert Ranges.sent["whole"] == sum(path.stat().st_size for path in (tmp_path / "set").glob("*.tar"))
    assert "parts" not in Ranges.sent


def narrow_index(served: str, tmp_path: Path) -> ShardIndex:
    index = open_index(source(served, tmp_path / "cache", some_tars(tmp_path, 4)))
    index.read_at_once(NUM_TARS)
    return index


def test_a_copy_in_a_worker_reads_parts_too(served: str, tmp_path: Path) -> None:
    index = narrow_index(served, tmp_path)
    copied = pickle.loads(pickle.dumps(index))
    assert copied.read(7) == index.read(7) == ShardIndex.open(tmp_path / "set").read(7)
    assert "whole" not in Ranges.sent


def test_a_server_that_sends_files_whole_is_named_and_its_tars_are_copied(
    served: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Ranges, "gives_parts", False)
    index = narrow_index(served, tmp_path)
    assert index.read(7) == ShardIndex.open(tmp_path / "set").read(7)
    assert "its server sends files whole: raise cache_gb" in caplog.text
    assert len(list(tmp_path.glob("cache/*/*.tar"))) == 1


def test_a_part_that_does_not_come_is_asked_for_again_and_one_that_changed_is_the_sample_s_fault(
    served: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ranges, "fails", 2)
    index, plain = narrow_index(served, tmp_path), ShardIndex.open(tmp_path / "set")
    assert index.read(4) == plain.read(4)
    tar, offset = tmp_path / "set" / "shard-000002.tar", plain.entry(7).members[0].offset
    content = bytearray(tar.read_bytes())
    content[offset] ^= 1
    tar.write_bytes(content)
    with pytest.raises(DamagedSampleError, match="changed since it was indexed"):
        index.read(7)
    tar.unlink()
    with pytest.raises((DamagedSampleError, remote.RemoteError, AwayError), match=r"shard-000002\.tar"):
        index.read(8)
