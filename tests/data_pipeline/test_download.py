"""One try to copy: it is given up on where a server drips or stalls, and takes no more bytes than were stated."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from data_pipeline import download, remote
from data_pipeline.config import SourceConfig
from data_pipeline.source import open_index
from models.common.errors import AwayError, InputError
from tests.support.shard_servers import Flaky


@pytest.mark.parametrize("fault", [RuntimeError("a client's own kind"), KeyError("x"), OSError("plain")])
def test_whatever_a_client_raises_is_tried_again_and_then_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    tries = []

    def fail(url: str) -> tuple[Any, str]:
        tries.append(url)
        raise fault

    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.0)
    monkeypatch.setattr(download, "_other", fail)
    with pytest.raises(InputError, match=r"^hf://datasets/a/b/index/meta\.json cannot be copied after 4 tries: \S.*$"):
        open_index(SourceConfig(path="hf://datasets/a/b", cache=str(tmp_path)))
    assert len(tries) == 4


def test_a_server_that_stalls_is_asked_again(served: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = open_index(SourceConfig(path=served, cache=str(tmp_path / "cache")))
    monkeypatch.setattr(download, "TIMEOUT_S", 0.3)
    monkeypatch.setattr(Flaky, "stall_s", 1.0)
    assert index.read(0)["txt"].startswith(b"caption 0")
    assert Flaky.seen["/set/shard-000000.tar"] == 2


DRIPS = {
    "body": b"HTTP/1.1 200 OK\r\nContent-Length: 20480\r\n\r\n",
    "headers": b"HTTP/1.1 200 OK\r\nx: ",
}
"""What comes at once; after it a byte comes now and then, each in time."""


@pytest.mark.parametrize("part", ["body", "headers"])
def test_a_server_that_drips_is_not_outlasted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    monkeypatch.setattr(download, "PATIENCE_S", 0.1)
    monkeypatch.setattr(download, "LOOK_S", 0.02)
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
    monkeypatch.setattr(download, "LOOK_S", 0.02)
    monkeypatch.setattr(download, "PATIENCE_S", 0.3)
    monkeypatch.setattr(download, "LEAST_BYTES_PER_S", 1000)

    def slow(url: str, target: Path, *_: Any) -> None:
        with target.open("wb", 0) as stream:
            for start in range(0, len(sent), len(sent) // 40 + 1):
                stream.write(sent[start : start + len(sent) // 40 + 1])
                time.sleep(0.02)

    monkeypatch.setattr(download, "_download", slow)
    assert remote.RemoteSet(served, tmp_path, 1 << 30).copy("a.tar", len(sent)).read_bytes() == sent


def test_no_more_bytes_are_taken_than_were_stated(served: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "set" / "endless.tar").write_bytes(bytes(1 << 22))
    monkeypatch.setattr(download, "_CHUNK_BYTES", 1 << 12)
    download._download(f"{served}/endless.tar", tmp_path / "copy", 1000, threading.Event())
    assert 1000 < (tmp_path / "copy").stat().st_size <= 1000 + (1 << 12)
    with pytest.raises(
        InputError, match=r"endless\.tar cannot be copied after 4 tries: .* of 1000 bytes came|more than"
    ):
        remote.RemoteSet(served, tmp_path, 1 << 30).copy("endless.tar", 1000)
    assert not (tmp_path / "endless.tar").exists()
