"""Memory and cache stay bounded over a long run: copied and evicted tars, bad samples, packing, thousands of draws."""

from __future__ import annotations

import os
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.config import RowPacking, SourceConfig
from data_pipeline.index_build import build_index
from data_pipeline.stream import RowStream
from tests.support.shards import image_bytes, write_tar
from tests.support.streams import config, open_rank

NUM_SHARDS, SHARD_SAMPLES = 12, 20


class Quiet(SimpleHTTPRequestHandler):
    """Serves a folder, says nothing."""

    def log_message(self, *_arguments: Any) -> None:
        pass


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def write_shards(folder: Path) -> int:
    """Images of noise, 25 kB each; one sample in 40 is cut. Returns the set's bytes."""
    folder.mkdir()
    payloads = [image_bytes(n, (90, 90)) for n in range(SHARD_SAMPLES)]
    for shard in range(NUM_SHARDS):
        samples = [(f"{shard}-{n}", {"png": payload, "txt": b"noise"}) for n, payload in enumerate(payloads)]
        if shard % 2:
            samples[3] = ("cut", {"png": payloads[3][:900], "txt": b"noise"})
        write_tar(folder / f"{shard:03d}.tar", samples)
    build_index(folder)
    return sum(path.stat().st_size for path in folder.glob("*.tar"))


def draw(stream: RowStream, count: int) -> None:
    goal = stream.num_drawn + count
    while stream.num_drawn < goal:
        stream.next_rows()


@pytest.mark.slow
def test_thousands_of_draws_leave_nothing_behind(tmp_path: Path) -> None:
    max_bytes = write_shards(tmp_path / "set") // 3
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    source = SourceConfig(
        path=f"http://127.0.0.1:{server.server_port}/set", cache=str(tmp_path / "cache"), cache_gb=max_bytes / 1e9
    )
    data = config(source, max_length=128, packing=RowPacking(row_tokens=256), shuffle_window=SHARD_SAMPLES)
    stream = open_rank(data, num_slots=2, epochs=None, quarantine=tmp_path / "quarantine.jsonl")
    draw(stream, 500)
    before_mb = resident_mb()
    draw(stream, 1500)
    grown_mb = resident_mb() - before_mb
    cached = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.tar"))
    stream.close()
    server.shutdown()
    server.server_close()
    assert stream.num_bad == len((tmp_path / "quarantine.jsonl").read_text().splitlines()) > 30
    assert cached <= max_bytes
    assert grown_mb < 8  # the images of 1,500 draws are 37 MB
