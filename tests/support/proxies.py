"""A small reverse proxy that serves a page below a path, as nginx does with `location` and `proxy_pass`."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "te", "upgrade", "content-length"}


@contextmanager
def proxy(target: str, prefix: str) -> Iterator[str]:
    """Hand on what lies below `prefix`, which is taken off, and nothing else; yields the address outside."""
    upstream = urlsplit(target)

    class Handler(BaseHTTPRequestHandler):
        def _hand_on(self) -> None:
            if not self.path.startswith(f"{prefix}/"):
                self.send_error(404, "nothing here but the page's prefix")
                return
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP_BY_HOP}
            headers |= {"X-Forwarded-Host": self.headers["Host"], "X-Forwarded-Proto": "http"}
            headers |= {"X-Forwarded-For": self.client_address[0], "Accept-Encoding": "identity"}
            connection = http.client.HTTPConnection(str(upstream.hostname), upstream.port)
            try:
                connection.request(self.command, self.path.removeprefix(prefix), body, headers)
                self._hand_back(connection.getresponse())
            finally:
                connection.close()

        def _hand_back(self, response: http.client.HTTPResponse) -> None:
            self.send_response(response.status)
            for name, value in response.getheaders():
                if name.lower() not in _HOP_BY_HOP:
                    self.send_header(name, value)
            self.send_header("Connection", "close")
            self.end_headers()
            with suppress(ConnectionError):
                while block := response.read1(1 << 16):  # as it comes: answers are streams
                    self.wfile.write(block)
                    self.wfile.flush()

        do_GET = do_POST = do_HEAD = _hand_on

        def log_message(self, *_arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}{prefix}/"
    finally:
        server.shutdown()
        server.server_close()
