"""HTTP as uvicorn reads it by httptools, with a bound on what stands before a body and behind it.

httptools and uvloop take a tenth of the server's CPU seconds off (docs/log.md). By itself httptools keeps a header of
any length until it is whole.
"""

from __future__ import annotations

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from tools.serve.errors import invalid

MAX_HEAD_BYTES = 1 << 16
"""Of a request's first line and headers, and of the lines behind a body that came in chunks."""


class BoundedProtocol(HttpToolsProtocol):
    """A connection, closed with 400 where more than `MAX_HEAD_BYTES` came that are no body, or what is no HTTP."""

    _num_head_bytes = 0

    def data_received(self, data: bytes) -> None:
        """Read what has come; called by the event loop with at most 256 kB."""
        self._num_head_bytes += len(data)
        super().data_received(data)
        if self._num_head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response(f"headers of more than {MAX_HEAD_BYTES} bytes")

    def on_headers_complete(self) -> None:
        """Begin to serve the request."""
        self._num_head_bytes = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Hand on a piece of the body."""
        self._num_head_bytes = 0
        super().on_body(body)

    def send_400_response(self, msg: str) -> None:
        """Say what is wrong in the shape of every other error, and close: where the next request begins is unknown."""
        answer = invalid(msg, code="invalid_http").response()
        headers = [*answer.raw_headers, (b"connection", b"close")]
        lines = [b"HTTP/1.1 400 Bad Request", *(name + b": " + value for name, value in headers), b"", b""]
        self.transport.write(b"\r\n".join(lines) + answer.body)
        self.transport.close()
