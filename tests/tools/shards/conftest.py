"""A mirror of the published sets, on this machine."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest

from tests.support.mirror import REPLICA, Handler, replica_of
from tools.shards import download, fetch, sources
from tools.shards.sources import SOURCES


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    files = {urlsplit(file.url).path: REPLICA[file.name] for source in SOURCES.values() for file in source.files}
    for name, value in (("files", files), ("troubles", []), ("asked", [])):
        monkeypatch.setattr(Handler, name, value, raising=False)
    monkeypatch.setattr(download, "FIRST_WAIT_S", 0.001)
    small = {name: replica_of(source) for name, source in SOURCES.items()}
    monkeypatch.setattr(sources, "SOURCES", small)
    monkeypatch.setattr(fetch, "SOURCES", small)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
