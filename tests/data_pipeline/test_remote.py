"""A set behind a server gives what the set on disk gives; a failing server is tried again, then named."""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from data_pipeline import remote
from data_pipeline.config import SourceConfig
from data_pipeline.source import open_index
from models.errors import InputError
from tests.support.shards import write_set


class Flaky(SimpleHTTPRequestHandler):
    """Serves a folder; the first `failures` requests of each path fail or are cut short, in turn."""

    failures = 0
    stall_s = 0.0
    seen: dict[str, int]

    def do_GET(self) -> None:
        count = self.seen[self.path] = self.seen.get(self.path, 0) + 1
        if count == 1 and self.path.endswith(".tar"):
            time.sleep(self.stall_s)
        if count > self.failures:
            with suppress(ConnectionError):  # who stalled is not waited for
                super().do_GET()
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


def test_the_cache_is_bounded(served: str, tmp_path: Path) -> None:
    index = open_index(SourceConfig(path=served, cache=str(tmp_path / "cache"), cache_gb=2.5e-5))
    for n in range(9):
        index.read(n)
    assert sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.tar")) <= 25_000


def test_a_server_that_keeps_failing_is_named(served: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = open_index(SourceConfig(path=served, cache=str(tmp_path / "cache")))
    monkeypatch.setattr(Flaky, "failures", 99)
    with pytest.raises(InputError, match=r"shard-000001\.tar cannot be copied after 4 tries"):
        index.read(3)
    with pytest.raises(InputError, match=r"meta\.json cannot be copied"):
        open_index(SourceConfig(path=f"{served}/none", cache=str(tmp_path / "cache")))
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.suffix == ".tar"]


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
