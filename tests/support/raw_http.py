"""A client's connection byte by byte: requests that no library would send, and their answers."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.support.patience import GUARD_S
from tests.support.servers import Running

COMPLETIONS = "/v1/chat/completions"


@contextmanager
def connected(server: Running) -> Iterator[socket.socket]:
    with socket.create_connection((server.host, server.port), timeout=GUARD_S) as found:
        yield found


def head(server: Running, *lines: str, path: str = COMPLETIONS) -> bytes:
    first = [f"POST {path} HTTP/1.1", f"Host: {server.host}", "Content-Type: application/json", *lines]
    return "\r\n".join([*first, "", ""]).encode()


def answer_of(connection: socket.socket) -> tuple[int, dict[str, Any], bool]:
    """Status, JSON, and whether the connection was closed behind it."""
    found = b""
    while b"\r\n\r\n" not in found:
        piece = connection.recv(65536)
        assert piece, f"the connection ended: {found!r}"
        found += piece
    top, _, body = found.partition(b"\r\n\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in top.decode().split("\r\n"))}
    while len(body) < int(headers["content-length"]):
        body += connection.recv(65536)
    return int(top.split()[1]), json.loads(body), headers.get("connection") == "close"
