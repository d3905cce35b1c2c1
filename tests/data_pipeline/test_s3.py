"""A set in an S3 bucket gives what the set on disk gives: signed requests, retries, a bounded cache.

The server speaks the part of S3 that reading needs (HEAD, GET with ranges, an empty listing) and checks each signature
with the secret, as AWS describes it (Signature Version 4); the client is the AWS SDK inside pyarrow. The same was run
against moto 5.2.5 (docs/data.md).
"""

from __future__ import annotations

import hashlib
import hmac
import threading
from collections.abc import Iterator
from functools import reduce
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from data_pipeline import remote
from data_pipeline.config import SourceConfig
from data_pipeline.index import ShardIndex
from data_pipeline.source import open_index
from models.common.errors import AwayError, InputError
from tests.support.shards import write_set

SECRET = "secret"
LISTING = (
    b'<?xml version="1.0"?><ListBucketResult><KeyCount>0</KeyCount><IsTruncated>false</IsTruncated></ListBucketResult>'
)


class Bucket(BaseHTTPRequestHandler):
    """Serves `root` as the bucket `photos`; the first `failures` GETs of each tar fail or are cut short, in turn."""

    root: Path
    failures = 0
    seen: dict[str, int]
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, *, with_body: bool) -> None:
        path = urlsplit(self.path).path
        if self.signature() != self.headers.get("Authorization", "").rpartition("Signature=")[2]:
            self.send(403, b"", with_body)
        elif "list-type=2" in self.path:
            self.send(200, LISTING, with_body)
        elif not (file := self.root / path.removeprefix("/photos/")).is_file():
            self.send(404, b"", with_body)
        else:
            self.send_file(file, with_body)

    def send_file(self, file: Path, with_body: bool) -> None:
        content, asked = file.read_bytes(), self.headers.get("Range")
        if asked:
            start, _, end = asked.removeprefix("bytes=").partition("-")
            content = content[int(start) : int(end) + 1]
        count = self.seen[file.name] = self.seen.get(file.name, 0) + with_body
        trouble = file.suffix == ".tar" and with_body and count <= self.failures
        if trouble and count % 2:
            self.send(500, b"", with_body)
        else:
            self.send(206 if asked else 200, content, with_body, cut=trouble)

    def send(self, code: int, content: bytes, with_body: bool, *, cut: bool = False) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_body:
            self.wfile.write(content[: len(content) // 2] if cut else content)
        self.close_connection = cut

    def signature(self) -> str:
        """What the client must have come to, from the request as it is and the secret."""
        given = dict(
            part.split("=", 1) for part in self.headers.get("Authorization", "x ").split(" ", 1)[1].split(", ")
        )
        _, date, region, service, end = given.get("Credential", "////").split("/")
        names = given.get("SignedHeaders", "").split(";")
        url = urlsplit(self.path)
        headers = "".join(f"{name}:{self.headers.get(name, '').strip()}\n" for name in names)
        body = self.headers.get("x-amz-content-sha256", "")
        query = "&".join(sorted(url.query.split("&"))) if url.query else ""
        request = "\n".join([self.command, url.path, query, headers, ";".join(names), body])
        scope = "/".join([date, region, service, end])
        text = "\n".join(
            [
                "AWS4-HMAC-SHA256",
                self.headers.get("x-amz-date", ""),
                scope,
                hashlib.sha256(request.encode()).hexdigest(),
            ]
        )
        parts, first = [date, region, service, end, text], f"AWS4{SECRET}".encode()
        return reduce(lambda key, part: hmac.digest(key, part.encode(), "sha256"), parts, first).hex()

    def log_message(self, *_arguments: Any) -> None:
        pass


@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ShardIndex]:
    index = write_set(tmp_path / "bucket" / "deep" / "set", [3, 2, 4])
    monkeypatch.setattr(Bucket, "root", tmp_path / "bucket", raising=False)
    monkeypatch.setattr(Bucket, "seen", {}, raising=False)
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.01)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Bucket)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    environment = {"ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": SECRET, "REGION": "us-east-1"}
    environment["ENDPOINT_URL"] = f"http://127.0.0.1:{server.server_port}"
    for name, value in environment.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    yield index
    server.shutdown()
    server.server_close()


def bucket(tmp_path: Path, name: str = "set", **values: Any) -> SourceConfig:
    return SourceConfig(path=f"s3://photos/deep/{name}", cache=str(tmp_path / "cache"), **values)


def test_equals_the_set_on_disk_through_a_bounded_cache(
    local: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = open_index(bucket(tmp_path, cache_gb=2.5e-5))
    assert index.fingerprint == local.fingerprint
    monkeypatch.setattr(Bucket, "failures", 2)  # of each tar, a failure and a short answer come first
    assert [index.read(n) for n in range(9)] == [local.read(n) for n in range(9)]
    assert all(Bucket.seen[name] >= 3 for name in local.shard_names)
    copies = list((tmp_path / "cache").rglob("*.tar"))
    assert copies
    assert sum(path.stat().st_size for path in copies) <= 25_000
    some = open_index(bucket(tmp_path, "set/shard-{000001..000002}.tar"))
    assert [some.read(n) for n in range(6)] == [local.read(n) for n in range(3, 9)]


@pytest.mark.usefixtures("local")
def test_what_cannot_be_had_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "NUM_TRIES", 1)  # the SDK has tries of its own, with seconds between them
    with pytest.raises(InputError, match=r"s3://photos/deep/none/index/meta\.json cannot be copied: .*does not exist"):
        open_index(bucket(tmp_path, "none"))
    index = open_index(bucket(tmp_path))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    monkeypatch.setattr(remote, "AWAY_LIMIT_MINUTES", 0.0)  # the whole bucket is denied, not this tar
    with pytest.raises(AwayError, match=r"shard-000001\.tar has been away .*ACCESS_DENIED"):
        index.read(3)
