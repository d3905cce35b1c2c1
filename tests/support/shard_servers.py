"""A server of a shard set that fails, stalls or breaks its answers, as told."""

from __future__ import annotations

import time
from contextlib import suppress
from http.server import SimpleHTTPRequestHandler
from typing import Any

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
