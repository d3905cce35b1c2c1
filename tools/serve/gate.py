"""What every request passes first and last: its number, who asks, one line in the log, and no bug of ours unseen.

    request --> Host known? --> Origin ours? --> key? --> the app --> log line, metrics
                   403             403            401        |
                                                     an exception: 500 with the request's number, the connection lives

An exception must end here: what reaches Starlette's own handler is raised again, and uvicorn resets the connection.
Bodies, prompts, answers and keys are never logged.
"""

from __future__ import annotations

import ipaddress
import logging
import random
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tools.serve.errors import ApiError
from tools.serve.keys import Keys
from tools.serve.settings import Access
from tools.serve.shares import address_group

logger = logging.getLogger(__name__)

OPEN_PATHS = ("/health",)
"""Asked by load balancers and containers, which have no key."""

API_PATHS = ("/v1/", "/caption", "/question", "/chat", "/metrics")
"""Where only a Bearer key will do; a browser's name and password do for the page and the documentation."""


@dataclass
class Visit:
    """One request on its way: who asks, and what the log says of it at its end."""

    number: str
    """Random, and no secret."""
    client: str
    path: str
    method: str
    started_s: float = field(default_factory=time.monotonic)
    status: int = 0
    finish: str = "-"
    facts: dict[str, float] = field(default_factory=dict)
    """Tokens and seconds."""

    @property
    def request_id(self) -> str:
        """What the log and the client call it."""
        return f"req-{self.number}"


def visit_of(scope: Scope) -> Visit:
    """The visit that the gate has opened."""
    visit: Visit = scope["sightline"]
    return visit


class Gate:
    """The outermost layer of the app, an ASGI app itself.

    Args:
        app: what is behind it.
        keys: who is let in.
        access: names of hosts and origins.
        at_end: told of each visit when it is over.
    """

    def __init__(self, app: ASGIApp, keys: Keys, access: Access, at_end: Callable[[Visit], None]) -> None:
        self._app, self._keys, self._at_end = app, keys, at_end
        self._hosts = {name.lower() for name in (*access.hosts, "localhost", socket.gethostname())}
        self._origins = set(access.origins)

    def allow(self, address: str) -> None:
        """Let browsers ask under one more address, of a tunnel."""
        self._hosts.add(urlsplit(address).hostname or "")
        self._origins.add(address.rstrip("/"))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection's request, or the lifespan."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        host, headers = str(scope["client"][0]) if scope.get("client") else "", Headers(scope=scope)
        origin = headers.get("origin", "")
        visit = Visit(f"{random.getrandbits(96):024x}", address_group(host), scope["path"], scope["method"])
        scope["sightline"] = visit
        try:
            allowed = origin if origin in self._origins else ""
            await self._serve(scope, headers, receive, _Sender(send, visit, allowed))
        finally:
            self._at_end(visit)
            _log(visit)

    async def _serve(self, scope: Scope, headers: Headers, receive: Receive, send: _Sender) -> None:
        visit = visit_of(scope)
        try:
            if scope["method"] == "OPTIONS" and send.origin and "access-control-request-method" in headers:
                await _preflight(send)
                return
            self._check(headers, visit, is_allowed=bool(send.origin))
            await self._app(scope, receive, send)
        except ApiError as error:
            await self._answer(error, scope, receive, send)
        except Exception:
            logger.exception("%s %s %s ended in an error of ours", visit.request_id, visit.method, visit.path)
            text = f"something went wrong here; the server's log says more under {visit.request_id}"
            await self._answer(ApiError(500, text, code="internal_error"), scope, receive, send)

    async def _answer(self, error: ApiError, scope: Scope, receive: Receive, send: _Sender) -> None:
        if not send.has_begun:
            await error.response()(scope, receive, send)

    def _check(self, headers: Headers, visit: Visit, *, is_allowed: bool) -> None:
        """Let a request in, or raise ApiError; `is_allowed`: it comes from a page of a site that may ask."""
        if not self._knows(headers.get("host", "")):
            raise ApiError(403, "this host name is not served: start the server with --allow-host NAME", code="host")
        if headers.get("origin") and not is_allowed and not _is_same_site(headers):
            raise ApiError(403, "pages of other sites may not ask: start the server with --cors ORIGIN", code="origin")
        if not self._keys or visit.path in OPEN_PATHS:
            return
        is_api = visit.path.startswith(API_PATHS)
        name = self._keys.name_of(headers.get("authorization", ""), basic=not is_api)
        if name is None:
            scheme = "Bearer" if is_api else 'Basic realm="Sightline"'
            text = "no valid API key: send Authorization: Bearer KEY"
            raise ApiError(401, text, code="invalid_api_key", headers={"WWW-Authenticate": scheme})
        visit.client = name

    def _knows(self, host: str) -> bool:
        name = _name_of(host)
        # Who brings a key was not sent here by another site.
        return bool(self._keys) or "*" in self._hosts or name in self._hosts or _is_address(name)


class _Sender:
    """Sends, and notes status and headers. `origin` is that of a page of another site that may ask, or ""."""

    def __init__(self, send: Send, visit: Visit, origin: str) -> None:
        self._send, self._visit, self.origin = send, visit, origin
        self.has_begun = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.has_begun = True
            self._visit.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self._visit.request_id
            if self.origin:
                headers["Access-Control-Allow-Origin"] = self.origin
                headers["Access-Control-Expose-Headers"] = "x-request-id, Retry-After"
                headers.add_vary_header("Origin")
        await self._send(message)


async def _preflight(send: _Sender) -> None:
    headers = {
        "Access-Control-Allow-Methods": "GET, POST, DELETE",
        "Access-Control-Allow-Headers": "authorization, content-type",
        "Access-Control-Max-Age": "600",
    }
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": 204, "headers": raw})
    await send({"type": "http.response.body", "body": b""})


def _name_of(host: str) -> str:
    """The name or address in a Host header, without its port; "" where it is none."""
    try:
        parts = urlsplit(f"//{host}")
        _ = parts.port  # raises for what is no port
        return parts.hostname or ""
    except ValueError:
        return ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_same_site(headers: Headers) -> bool:
    """Whether a browser's page was loaded from here. A proxy may have taken the port off the host's name."""
    try:
        origin, host = urlsplit(headers["origin"]), urlsplit(f"//{headers.get('host', '')}")
        if host.port is None:
            return bool(host.hostname) and origin.hostname == host.hostname
        return origin.netloc.lower() == host.netloc.lower()
    except ValueError:
        return False


def _log(visit: Visit) -> None:
    facts = "".join(f" {name}={value:.4g}" for name, value in visit.facts.items())
    seconds = time.monotonic() - visit.started_s
    logger.info(
        "%s %s %s %s %d finish=%s seconds=%.3f%s",
        visit.request_id,
        visit.client or "-",
        visit.method,
        _printable(visit.path),
        visit.status or 499,
        visit.finish,
        seconds,
        facts,
    )


def _printable(path: str) -> str:
    """A path without line breaks; conversations' ids, which are secrets, are left out."""
    if path.startswith("/chat/"):
        return "/chat/…"
    return path.encode("unicode_escape").decode("ascii")[:200]
