"""Every error of every client is one of two kinds: it is tried again, or it is final."""

from __future__ import annotations

import http.client
import socket
import ssl
import urllib.error
from email.message import Message
from types import SimpleNamespace

import pytest

from models.common.errors import InputError
from models.common.transport import is_final


class ClientError(Exception):
    """As botocore, httpx and aiohttp derive theirs: from Exception."""

    def __init__(self, status: int | None = None) -> None:
        super().__init__("an error of a client")
        if status is not None:
            self.response = SimpleNamespace(status_code=status)


def answered(status: int) -> urllib.error.HTTPError:
    return urllib.error.HTTPError("http://x", status, "", Message(), None)


@pytest.mark.parametrize(
    "error",
    [
        http.client.IncompleteRead(b"half"),
        http.client.BadStatusLine("garbage"),
        http.client.RemoteDisconnected("closed"),
        http.client.LineTooLong("header line"),
        urllib.error.URLError(socket.gaierror(-3, "Temporary failure in name resolution")),
        ssl.SSLEOFError(8, "EOF occurred in violation of protocol"),
        ConnectionResetError(104, "Connection reset by peer"),
        TimeoutError("timed out"),
        ValueError("10 of 20 bytes came"),
        ClientError(),
        *[answered(status) for status in (408, 429, 500, 502, 503, 504)],
        ClientError(503),
    ],
)
def test_what_may_pass_is_tried_again(error: Exception) -> None:
    assert not is_final(error)


@pytest.mark.parametrize(
    "error",
    [
        *[answered(status) for status in (400, 401, 403, 404, 410)],
        ClientError(404),
        FileNotFoundError("s3://bucket/none"),
        PermissionError("s3://bucket/none"),
        ImportError("Install gcsfs to access Google Storage"),
        ValueError("Protocol not known: xyz"),
        InputError("said already"),
    ],
)
def test_what_no_other_try_changes_is_final(error: Exception) -> None:
    assert is_final(error)
