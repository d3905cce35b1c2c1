"""Fetching by address: what must be refused is refused, and what is bounded stays bounded."""

from __future__ import annotations

import ipaddress
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from models.common.errors import InputError
from tools.serve import fetch as fetching
from tools.serve.fetch import Address, Limits, fetch, is_public

ANY_PORT = range(1, 65536)
IMAGE = b"the bytes of an image" * 100


class Site(BaseHTTPRequestHandler):
    """A web site on this machine that behaves in all the ways a web site may."""

    def do_GET(self) -> None:
        behave = getattr(self, "show_" + self.path.strip("/").partition("?")[0], None)
        if behave is None:
            self.send_error(404)
        else:
            behave()

    def show_image(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(IMAGE)))
        self.end_headers()
        self.wfile.write(IMAGE)

    def show_moved(self) -> None:
        self._redirect("/image")

    def show_loop(self) -> None:
        self._redirect("/loop")

    def show_metadata(self) -> None:
        self._redirect("http://169.254.169.254/latest/meta-data")

    def show_file(self) -> None:
        self._redirect("file:///etc/passwd")

    def show_announced(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(10**12))
        self.end_headers()

    def show_endless(self) -> None:
        self.send_response(200)
        self.end_headers()
        try:
            while True:
                self.wfile.write(b"x" * 65536)
        except OSError:
            pass

    def show_short(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b"x" * 10)

    def show_drip(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self._drip(b"x")

    def show_headers(self) -> None:
        self.wfile.write(b"HTTP/1.0 200 OK\r\n")
        self._drip(b"X-A: b\r\n")

    def _drip(self, data: bytes) -> None:
        try:
            while True:  # until the other side closes
                self.wfile.write(data)
                time.sleep(0.1)
        except OSError:
            pass

    def _redirect(self, target: str) -> None:
        self.send_response(302)
        self.send_header("Location", target)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def loopback_too(address: Address) -> bool:
    return address.is_loopback or is_public(address)


@pytest.mark.parametrize("path", ["/image", "/image?size=large", "/moved"])
def test_a_image_comes_whole(site: str, path: str) -> None:
    assert fetch(site + path, allow=loopback_too, ports=ANY_PORT) == IMAGE


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/absent", "404"),
        ("/loop", "more than 3 redirects"),
        ("/metadata", "not a public address"),
        ("/file", "http:// or https://"),
        ("/announced", "larger than 0.1 MB"),
        ("/endless", "larger than 0.1 MB"),
        ("/short", "before the whole image"),
    ],
)
def test_a_bad_answer_is_refused_in_one_line(site: str, path: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        fetch(site + path, Limits(max_bytes=100_000), allow=loopback_too, ports=ANY_PORT)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["/drip", "/headers"])
def test_the_time_limit_holds_however_slowly_it_drips(site: str, path: str) -> None:
    """The site would drip for ever; the fetch returns at all."""
    with pytest.raises(InputError, match="took longer than"):
        fetch(site + path, Limits(timeout_s=0.5), allow=loopback_too, ports=ANY_PORT)


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/",
        "http://localhost:8000/",
        "http://[::1]/",
        "http://0.0.0.0/",
        "http://10.1.2.3/",
        "http://172.16.0.1/",
        "http://192.168.1.1/",
        "http://100.64.0.1/",
        "http://169.254.169.254/latest/meta-data",
        "http://[fd00::1]/",
        "http://[fe80::1]/",
        "http://[::ffff:127.0.0.1]/",
        "http://[64:ff9b::7f00:1]/",
        "http://[2002:7f00:1::]/",
        "http://224.0.0.1/",
        "http://2130706433/",
        "http://0x7f.1/",
    ],
)
def test_addresses_that_are_not_public_are_never_connected_to(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*_: object) -> None:
        raise AssertionError("connected")

    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(InputError):
        fetch(url)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "photo.jpg",
        "ftp://example.org/a.jpg",
        "file:///etc/passwd",
        "http://",
        "https://a:b@example.org/",
        "http://[::1",
        "http://example.org:99999/",
        "javascript:alert(1)",
    ],
)
def test_what_is_no_web_address_is_refused(url: str) -> None:
    with pytest.raises(InputError):
        fetch(url)


def test_one_private_address_among_public_ones_is_enough_to_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(*_: object, **__: object) -> list[tuple[object, ...]]:
        return [(2, 1, 6, "", (name, 80)) for name in ("93.184.215.14", "127.0.0.1")]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with pytest.raises(InputError, match="not a public address"):
        fetch("http://rebinding.example/")


def test_the_address_that_was_checked_is_the_one_connected_to(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    port = int(site.rsplit(":", 1)[1])
    answers = iter(["127.0.0.1", "10.0.0.1"])
    original = socket.getaddrinfo

    def resolve(host: str, *args: object, **kwargs: object) -> object:
        if host == "rebinding.example":
            return [(2, 1, 6, "", (next(answers), port))]
        return original(host, *args, **kwargs)  # type: ignore[call-overload]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    assert fetch(f"http://rebinding.example:{port}/image", allow=loopback_too, ports=ANY_PORT) == IMAGE
    assert next(answers) == "10.0.0.1", "the name must be looked up once"


def test_public_addresses_are_public() -> None:
    for text in ("93.184.215.14", "8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"):
        assert is_public(ipaddress.ip_address(text)), text
    assert fetching.Limits().max_bytes <= 50_000_000


@pytest.mark.parametrize("address", ["192.0.0.192", "168.63.129.16", "::ffff:168.63.129.16", "64:ff9b::c000:c0"])
def test_addresses_that_a_clouds_own_machines_answer_are_not_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("port", [22, 25, 6379, 8080])
def test_only_the_webs_ports_are_fetched_from(port: int) -> None:
    with pytest.raises(InputError, match="only 80 and 443 are"):
        fetch(f"http://example.org:{port}/a.jpg")


def test_a_name_service_that_says_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, **_words: [str(waits.wait())][1:])
    with pytest.raises(InputError, match="the name service took too long"):
        fetch("http://slow.example/a.jpg", Limits(timeout_s=0.1))
    waits.set()
