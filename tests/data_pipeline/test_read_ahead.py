"""Tars at an address are there before they are needed: a slow server costs one wait, not one for each tar."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from data_pipeline import remote
from data_pipeline.config import SourceConfig
from data_pipeline.read_ahead import ReadAhead
from tests.support.shards import write_set
from tests.support.streams import config, open_rank

DELAY_S, STEP_S = 0.12, 0.09


class Slow(SimpleHTTPRequestHandler):
    """Each tar takes a while; those named in `failing` never come."""

    failing = ""
    asked: list[str]

    def do_GET(self) -> None:
        if self.path.endswith(".tar"):
            self.asked.append(self.path)
            time.sleep(DELAY_S)
        if self.failing and self.path.endswith(self.failing):
            self.send_error(503)
        else:
            super().do_GET()

    def log_message(self, *_arguments: Any) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    write_set(tmp_path / "set", [2] * 5)
    monkeypatch.setattr(Slow, "asked", [], raising=False)
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.01)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Slow, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/set"
    server.shutdown()
    server.server_close()


def epoch(url: str, cache: Path, *, cache_gb: float = 1.0, step_s: float = STEP_S) -> tuple[float, list[str]]:
    """Seconds waited for rows, and the keys, of one epoch whose steps take a while."""
    source = SourceConfig(path=url, cache=str(cache), cache_gb=cache_gb)
    data = config(source, shuffle_window=2, bad_share_limit=1.0)
    stream = open_rank(data, num_slots=1, quarantine=cache / "quarantine.jsonl")
    waited_s, keys = 0.0, list[str]()
    while not stream.exhausted:
        start = time.monotonic()
        keys += [sample.key for row in stream.next_rows() for sample in row]
        waited_s += time.monotonic() - start
        time.sleep(step_s)
    stream.close()
    return waited_s, keys


def test_waiting_falls_and_the_order_stays(served: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ahead_s, keys = epoch(served, tmp_path / "ahead")
    assert len(Slow.asked) == 5
    monkeypatch.setattr(ReadAhead, "advance", lambda *_: None)
    alone_s, same = epoch(served, tmp_path / "alone")
    assert keys == same
    assert len(set(keys)) == 10
    assert alone_s >= 5 * DELAY_S
    assert ahead_s < 0.6 * alone_s


def test_a_small_cache_stays_bounded(served: str, tmp_path: Path) -> None:
    """Room for two tars and a half: nothing that is about to be read is thrown out for what comes later."""
    num_bytes = (tmp_path / "set" / "shard-000000.tar").stat().st_size
    _, keys = epoch(served, tmp_path / "cache", cache_gb=2.5 * num_bytes / 1e9, step_s=0.02)
    assert len(set(keys)) == 10
    assert len(Slow.asked) == 5
    assert sum(path.stat().st_size for path in tmp_path.rglob("cache/*/*.tar")) <= 2.5 * num_bytes


def test_a_tar_that_never_comes_is_left_to_its_reader(
    served: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Slow, "failing", "shard-000002.tar")
    _, keys = epoch(served, tmp_path / "cache", step_s=0.02)
    assert len(keys) == 8
    lines = [json.loads(line) for line in (tmp_path / "cache" / "quarantine.jsonl").read_text().splitlines()]
    assert {(line["shard"], line["key"]) for line in lines} == {("shard-000002.tar", f"00000{n}") for n in (4, 5)}
    assert all("after 4 tries" in line["reason"] for line in lines)
