"""A set behind a server gives what the set on disk gives; a failing server is tried again, then named."""

from __future__ import annotations

import errno
import json
import pickle
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline import remote
from data_pipeline.config import SourceConfig
from data_pipeline.source import open_index
from data_pipeline.tar_bytes import DamagedSampleError
from models.common.errors import AwayError, InputError
from tests.support.shards import write_set

BROKEN = {
    "chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "status": b"garbage\r\n\r\n",
    "header": b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 200 + b"\r\n",
    "reset": b"",
}
"""Answers that no client can read, as they are on the wire."""


class Flaky(SimpleHTTPRequestHandler):
    """Serves a folder; the first `failures` requests of each path fail or are cut short, in turn."""

    failures = 0
    fault = ""
    only = ""
    """What ends so fails, and all else is whole."""
    stall_s = 0.0
    seen: dict[str, int]

    def do_GET(self) -> None:
        count = self.seen[self.path] = self.seen.get(self.path, 0) + 1
        if count == 1 and self.path.endswith(".tar"):
            time.sleep(self.stall_s)
        if count > self.failures or not self.path.endswith(self.only):
            with suppress(ConnectionError):  # who stalled is not waited for
                super().do_GET()
        elif self.fault:
            self.wfile.write(BROKEN[self.fault])
            self.close_connection = True
        elif count % 2:
            self.send_error(503)
        else:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"cut")

    def log_message(self, *_arguments: Any) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    write_set(tmp_path / "set", [3, 2, 4])
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(remote, "LONGEST_WAIT_S", 0.02)
    monkeypatch.setattr(Flaky, "seen", {}, raising=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Flaky, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/set"
    server.shutdown()
    server.server_close()


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


@pytest.mark.parametrize("fault", [RuntimeError("a client's own kind"), KeyError("x"), OSError("plain")])
def test_whatever_a_client_raises_is_tried_again_and_then_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    tries = []

    def fail(url: str) -> tuple[Any, str]:
        tries.append(url)
        raise fault

    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.0)
    monkeypatch.setattr(remote, "_other", fail)
    with pytest.raises(InputError, match=r"^hf://datasets/a/b/index/meta\.json cannot be copied after 4 tries: \S.*$"):
        open_index(SourceConfig(path="hf://datasets/a/b", cache=str(tmp_path)))
    assert len(tries) == 4


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

    monkeypatch.setattr(remote, "_download", fill)
    with pytest.raises(AwayError, match=r"the cache of http.*: No space left on device; make room"):
        index.read(0)


def test_a_server_that_stalls_is_asked_again(served: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = open_index(SourceConfig(path=served, cache=str(tmp_path / "cache")))
    monkeypatch.setattr(remote, "TIMEOUT_S", 0.3)
    monkeypatch.setattr(Flaky, "stall_s", 1.0)
    assert index.read(0)["txt"].startswith(b"caption 0")
    assert Flaky.seen["/set/shard-000000.tar"] == 2


def test_a_set_made_anew_replaces_its_copies(served: str, tmp_path: Path) -> None:
    source = SourceConfig(path=served, cache=str(tmp_path / "cache"))
    old = open_index(source)
    old.read(0)
    write_set(tmp_path / "set", [2, 2], words=5)
    new = open_index(source)
    assert new.shard_sizes == [2, 2, 4]
    assert b"word word word" in new.read(0)["txt"]


DRIPS = {
    "body": b"HTTP/1.1 200 OK\r\nContent-Length: 20480\r\n\r\n",
    "headers": b"HTTP/1.1 200 OK\r\nx: ",
}
"""What comes at once; after it a byte comes now and then, each in time."""


@pytest.mark.parametrize("part", ["body", "headers"])
def test_a_server_that_drips_is_not_outlasted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    monkeypatch.setattr(remote, "PATIENCE_S", 0.1)
    monkeypatch.setattr(remote, "LOOK_S", 0.02)
    monkeypatch.setattr(remote, "AWAY_LIMIT_MINUTES", 0.0)
    stop = threading.Event()

    class Drip(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            with suppress(OSError):
                self.wfile.write(DRIPS[part])
                while not stop.wait(0.01):
                    self.wfile.write(b"x")

        def log_message(self, *_arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Drip)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        with pytest.raises(AwayError, match=r"/a\.tar has been away for 0 minutes \(\d+ bytes came, for 0\.1 s fewer"):
            remote.RemoteSet(f"http://127.0.0.1:{server.server_port}/set", tmp_path, 1 << 30).copy("a.tar", 20480)
    finally:
        stop.set()
        server.shutdown()
        server.server_close()
    for thread in threading.enumerate():
        if thread.name == "download":  # given up on, and about to clean up behind itself
            thread.join()
    assert not [path for path in tmp_path.iterdir() if path.suffix in (".tar", ".tmp")]


def test_a_slow_copy_that_keeps_up_is_waited_for(served: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes longer than the patience in all; what came so far counts."""
    sent = (tmp_path / "set" / "shard-000000.tar").read_bytes()
    monkeypatch.setattr(remote, "LOOK_S", 0.02)
    monkeypatch.setattr(remote, "PATIENCE_S", 0.3)
    monkeypatch.setattr(remote, "LEAST_BYTES_PER_S", 1000)

    def slow(url: str, target: Path, *_: Any) -> None:
        with target.open("wb", 0) as stream:
            for start in range(0, len(sent), len(sent) // 40 + 1):
                stream.write(sent[start : start + len(sent) // 40 + 1])
                time.sleep(0.02)

    monkeypatch.setattr(remote, "_download", slow)
    assert remote.RemoteSet(served, tmp_path, 1 << 30).copy("a.tar", len(sent)).read_bytes() == sent


def test_no_more_bytes_are_taken_than_were_stated(served: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "set" / "endless.tar").write_bytes(bytes(1 << 22))
    monkeypatch.setattr(remote, "_CHUNK_BYTES", 1 << 12)
    remote._download(f"{served}/endless.tar", tmp_path / "copy", 1000, threading.Event())
    assert 1000 < (tmp_path / "copy").stat().st_size <= 1000 + (1 << 12)
    with pytest.raises(
        InputError, match=r"endless\.tar cannot be copied after 4 tries: .* of 1000 bytes came|more than"
    ):
        remote.RemoteSet(served, tmp_path, 1 << 30).copy("endless.tar", 1000)
    assert not (tmp_path / "endless.tar").exists()


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
