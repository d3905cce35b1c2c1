"""What is wrong inside a whole tar: named with shard, key and reason, replaced and counted; nothing is executed."""

from __future__ import annotations

import json
import os
import pickle
import resource
import struct
import tarfile
import tracemalloc
import warnings
import zlib
from pathlib import Path
from typing import Any

import pytest

from data_pipeline import build
from data_pipeline.images import open_image
from data_pipeline.index import ShardIndex
from data_pipeline.index_build import build_index
from data_pipeline.limits import ImageError
from data_pipeline.stream import RowStream
from models.common.errors import InputError
from tests.support.deadly import DeadlyEncoder
from tests.support.paths import data, needs_data
from tests.support.shards import caption_sample, image_bytes, write_tar
from tests.support.streams import config, keys_left, open_rank

NUM_GOOD = 30


def bomb() -> bytes:
    """A valid PNG of 30,000 x 30,000 pixels in about 100 KiB; decoded it is 2.7 GB."""
    packer, row = zlib.compressobj(1), bytes(1 + 30_000 // 8)
    pixels = b"".join(packer.compress(row * 100) for _ in range(300)) + packer.flush()
    parts = [(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 1, 0, 0, 0, 0)), (b"IDAT", pixels), (b"IEND", b"")]
    chunks = [
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


class Owned:
    """Unpickled, it makes a directory."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def record(value: object) -> bytes:
    return json.dumps(value).encode()


ASKED = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Noise."}]
BAD: dict[str, tuple[dict[str, bytes], str]] = {
    "no-image": ({"json": record({"conversations": ASKED})}, "0 images but 1 <image>"),
    "no-text": ({"png": image_bytes()}, "no text"),
    "bomb": ({"png": bomb(), "txt": b"a"}, "900000000 pixels"),
    "cut": ({"png": image_bytes()[:300], "txt": b"a"}, "cannot be decoded"),
    "list": ({"png": image_bytes(), "json": b"[1, 2]"}, "is a list"),
    "number": ({"png": image_bytes(), "json": b"7"}, "is a int"),
    "words": ({"png": image_bytes(), "json": record({"conversations": "hello"})}, "not a list"),
    "turns": ({"png": image_bytes(), "json": record({"conversations": [["human", "hello"]]})}, "not an object"),
    "values": ({"png": image_bytes(), "json": record({"conversations": [{"from": "human", "value": 3}]})}, "without"),
    "unfinished": ({"png": image_bytes(), "json": b'{"text": "a'}, "cannot be read"),
    "masked": (
        {"png": image_bytes(), "json": record({"conversations": [ASKED[0], {"from": "gpt", "value": " "}]})},
        "to learn",
    ),
    "deep": ({"png": image_bytes(), "json": b"[" * 100_000}, "cannot be read"),
}


def open_epoch(folder: Path, quarantine: Path, **values: Any) -> RowStream:
    return open_rank(config(folder, **values), num_slots=2, quarantine=quarantine)


def write_samples(folder: Path, bad: dict[str, dict[str, bytes]]) -> Path:
    folder.mkdir()
    write_tar(folder / "a.tar", [*((f"good{n:02d}", caption_sample(n)) for n in range(NUM_GOOD)), *bad.items()])
    build_index(folder)
    return folder


def test_each_is_named_with_shard_key_and_reason(tmp_path: Path) -> None:
    folder = write_samples(tmp_path / "set", {key: files for key, (files, _) in BAD.items()})
    stream = open_epoch(folder, tmp_path / "q.jsonl", bad_share_limit=1.0)
    assert sorted(keys_left(stream)) == [f"good{n:02d}" for n in range(NUM_GOOD)]
    lines = {line["key"]: line for line in map(json.loads, (tmp_path / "q.jsonl").read_text().splitlines())}
    assert set(lines) == set(BAD)
    assert stream.num_bad == len(BAD)
    for key, (_, reason) in BAD.items():
        assert lines[key]["shard"] == "a.tar"
        assert reason in lines[key]["reason"], key


def test_past_the_set_share_the_run_stops_and_says_why(tmp_path: Path) -> None:
    folder = write_samples(tmp_path / "set", {key: files for key, (files, _) in BAD.items()})
    stream = open_epoch(folder, tmp_path / "q.jsonl", bad_share_limit=0.02)
    with pytest.raises(InputError, match=r"more than 2%; the last: a\.tar .*tools\.shards check"):
        keys_left(stream)
    assert len((tmp_path / "q.jsonl").read_text().splitlines()) == 5  # of the 200 draws that are the least to judge


@needs_data
def test_every_hostile_image_is_seen_or_named(tmp_path: Path) -> None:
    files = [data("bad_inputs", entry["file"]) for entry in json.loads(data("bad_inputs", "index.json").read_text())]
    images = {f"{n:03d}": {"png": path.read_bytes(), "txt": b"a"} for n, path in enumerate(files)}
    stream = open_epoch(write_samples(tmp_path / "set", images), tmp_path / "q.jsonl", bad_share_limit=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        seen = [key for key in keys_left(stream) if not key.startswith("good")]
    lines = [json.loads(line) for line in (tmp_path / "q.jsonl").read_text().splitlines()]
    assert sorted([*seen, *(line["key"] for line in lines)]) == sorted(images)
    assert stream.num_bad == len(lines)
    assert all(line["shard"] == "a.tar" and line["reason"] and "\n" not in line["reason"] for line in lines)
    readable = {key for key, sample in images.items() if can_be_read(sample["png"])}
    assert set(seen) == readable
    assert 90 < len(readable) < len(images)


def can_be_read(payload: bytes) -> bool:
    try:
        return open_image(payload).mode == "RGB"
    except ImageError:
        return False


@pytest.mark.slow
def test_a_sample_that_kills_workers_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "Encoder", DeadlyEncoder)
    stream = open_epoch(write_samples(tmp_path / "set", {}), tmp_path / "q.jsonl", num_workers=1)
    assert sorted(keys_left(stream)) == [f"good{n:02d}" for n in range(NUM_GOOD) if n != 3]
    stream.close()
    (line,) = map(json.loads, (tmp_path / "q.jsonl").read_text().splitlines())
    assert (line["shard"], line["key"]) == ("a.tar", "good03")
    assert "died on this sample" in line["reason"]


def test_nothing_in_a_shard_is_executed(tmp_path: Path) -> None:
    mark = tmp_path / "owned"
    payload = pickle.dumps(Owned(mark))
    endings = ("pyd", "pkl", "pickle", "pth", "npy", "cls", "ten", "msgpack")
    folder = write_samples(tmp_path / "set", {"evil": {"txt": b"text", **dict.fromkeys(endings, payload)}})
    assert "evil" in keys_left(open_epoch(folder, tmp_path / "q.jsonl"))
    assert not mark.exists()
    pickle.loads(payload)
    assert mark.exists()  # it would have worked


def test_bombs_cost_no_memory(tmp_path: Path) -> None:
    payload = bomb()
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ImageError, match="900000000 pixels"):
        open_image(payload)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 100_000
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("a.txt")
        info.pax_headers = {"comment": "x" * 50_000_000}
        archive.addfile(info)
    tracemalloc.start()
    with pytest.raises(InputError, match="extended header"):
        build_index(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000


def test_the_index_knows_a_bomb_by_its_header(tmp_path: Path) -> None:
    index = ShardIndex.open(write_samples(tmp_path / "set", {"bomb": BAD["bomb"][0]}))
    sizes = {(member.width, member.height) for member in index.entry(NUM_GOOD).members}
    assert sizes <= {(30_000, 30_000), (0, 0)}
