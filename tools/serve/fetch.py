"""Fetching an image by its address, without access to the internal network (SSRF).

    URL -> scheme and host -> resolve once -> every address public? -> connect to that very address -> body, bounded
     ^                                                                                              |
     +------------------------------ redirect: all checks again -----------------------------------+

Owns the checks, the limits and the connection. Does not own decoding: the bytes are as untrusted as an upload's.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import queue
import socket
import ssl
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, urljoin, urlsplit

from data_pipeline.limits import MAX_BYTES
from models.common.errors import InputError, single_line

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_OF_PROVIDERS = (ipaddress.IPv4Network("192.0.0.0/24"), ipaddress.IPv4Address("168.63.129.16"))
"""Public to Python's tables, and answered by the machine's own provider: IETF's protocol assignments, of which Oracle's
cloud uses 192.0.0.192 for its metadata, and Azure's host agent."""

_LOOKING_UP = threading.BoundedSemaphore(8)
"""How many names are looked up at once; one that hangs keeps its thread."""

PORTS = (80, 443)
"""Other ports belong to other services, of which some take what is sent to them for orders."""


@dataclass(frozen=True)
class Limits:
    """What one fetch may cost. `timeout_s` bounds all of it, redirects included, however slow the transfer."""

    max_bytes: int = MAX_BYTES
    timeout_s: float = 10.0
    max_redirects: int = 3


def is_public(address: Address) -> bool:
    """Whether the address belongs to the public internet, IPv4 addresses wrapped in IPv6 included."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if inner is None and address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if address.teredo is not None:
            return False
        if inner is not None:
            return is_public(inner)
    if isinstance(address, ipaddress.IPv4Address) and (address in _OF_PROVIDERS[0] or address == _OF_PROVIDERS[1]):
        return False
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)


def fetch(
    url: str,
    limits: Limits = Limits(),
    *,
    allow: Callable[[Address], bool] = is_public,
    ports: Collection[int] = PORTS,
) -> bytes:
    """The body of `url`. Raises InputError, in one line, for whatever keeps it from coming.

    `allow` judges each address that a host name has; it exists for tests, which only have this machine.
    """
    deadline_s = time.monotonic() + limits.timeout_s
    for _ in range(limits.max_redirects + 1):
        parts = _split(url)
        if _port(parts) not in ports:
            raise InputError(f"port {_port(parts)} is not fetched from: only {' and '.join(map(str, ports))} are")
        address = _resolve(parts, allow, deadline_s)
        try:
            answer = _ask(parts, address, limits, max(deadline_s - time.monotonic(), 0.001))
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = single_line(error)
            if time.monotonic() < deadline_s:
                raise InputError(f"{parts.hostname} could not be read: {reason}") from error
            answer = b""
        if time.monotonic() >= deadline_s:  # a connection that was broken off may look like one that ended
            raise InputError(f"{parts.hostname} took longer than {limits.timeout_s:g} s: try again")
        if isinstance(answer, bytes):
            return answer
        url = urljoin(url, answer)
    raise InputError(f"the address leads through more than {limits.max_redirects} redirects: give the last one")


def _ask(parts: SplitResult, address: Address, limits: Limits, timeout_s: float) -> bytes | str:
    """One request: the body, or a redirect's target."""
    connection = _Pinned(parts, address, timeout_s=timeout_s)
    watchdog = threading.Timer(timeout_s, connection.abort)
    watchdog.daemon = True
    watchdog.start()
    try:
        connection.request("GET", _target(parts), headers={"Accept": "image/*", "User-Agent": "sightline-demo"})
        response = connection.getresponse()
        location = response.getheader("Location")
        if response.status in (301, 302, 303, 307, 308) and location:
            return location
        if response.status != 200:
            raise InputError(f"{parts.hostname} answered {response.status} {response.reason}: try another address")
        return _body(response, limits)
    finally:
        watchdog.cancel()
        connection.close()


class _Pinned(http.client.HTTPConnection):
    """A connection to one checked address, whatever the host name resolves to by now; TLS checks the name."""

    def __init__(self, parts: SplitResult, address: Address, *, timeout_s: float) -> None:
        assert parts.hostname is not None
        super().__init__(parts.hostname, _port(parts), timeout=timeout_s)
        self._address = str(address)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._open: socket.socket | None = None  # `sock` is released when the headers have arrived

    def connect(self) -> None:
        self.sock = socket.create_connection((self._address, self.port), self.timeout)
        if self._tls is not None:
            self.sock = self._tls.wrap_socket(self.sock, server_hostname=self.host, do_handshake_on_connect=False)
        self._open = self.sock
        if isinstance(self.sock, ssl.SSLSocket):
            self.sock.do_handshake()

    def abort(self) -> None:
        """Abort from another thread, even during a handshake or a read."""
        if self._open is not None:
            with contextlib.suppress(OSError):  # it may have ended by itself
                self._open.shutdown(socket.SHUT_RDWR)


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url.strip())
        port_is_valid = parts.port != 0
    except ValueError as error:
        raise InputError(f"this is no address of an image: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname or not port_is_valid:
        raise InputError("an address begins with http:// or https:// and a host name")
    if parts.username is not None or parts.password is not None:
        raise InputError("an address with a user name or password in it is not fetched")
    return parts


def _resolve(parts: SplitResult, allow: Callable[[Address], bool], deadline_s: float) -> Address:
    """The first of the host's addresses, when all of them are allowed."""
    assert parts.hostname is not None
    try:
        found = _looked_up(parts.hostname, _port(parts), deadline_s)
    except (OSError, UnicodeError) as error:
        raise InputError(f"{parts.hostname} is not known to the name service") from error
    if found is None:
        raise InputError(f"the name service took too long to find {parts.hostname}: try again")
    addresses = [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]
    for address in addresses:
        if not allow(address):
            raise InputError(f"{parts.hostname} is not a public address: only the public internet is fetched from")
    return addresses[0]


def _looked_up(host: str, port: int, deadline_s: float) -> list[Any] | None:
    """What the name service says, or None where it says nothing in time: `getaddrinfo` itself has no limit."""
    answer: queue.SimpleQueue[list[Any] | OSError | UnicodeError] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answer.put(list(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)))
        except (OSError, UnicodeError) as error:
            answer.put(error)
        finally:
            _LOOKING_UP.release()

    if not _LOOKING_UP.acquire(timeout=max(deadline_s - time.monotonic(), 0)):
        return None
    threading.Thread(target=ask, name="look-up", daemon=True).start()
    try:
        found = answer.get(timeout=max(deadline_s - time.monotonic(), 0))
    except queue.Empty:
        return None
    if isinstance(found, Exception):
        raise found
    return found


def _port(parts: SplitResult) -> int:
    return parts.port or (443 if parts.scheme == "https" else 80)


def _target(parts: SplitResult) -> str:
    path = parts.path or "/"
    return f"{path}?{parts.query}" if parts.query else path


def _body(response: http.client.HTTPResponse, limits: Limits) -> bytes:
    too_large = InputError(f"the image is larger than {limits.max_bytes / 1e6:g} MB: take a smaller one")
    if int(response.getheader("Content-Length") or 0) > limits.max_bytes:
        raise too_large
    body = response.read(limits.max_bytes + 1)
    if len(body) > limits.max_bytes:
        raise too_large
    if response.length:  # what Content-Length promised and did not come
        raise ConnectionError("the connection ended before the whole image had come")
    return body
