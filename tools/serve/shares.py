"""How many requests of one client are under way at once: the server's load is shared between keys, or addresses."""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from tools.serve.errors import ApiError


class Shares:
    """Counts the requests of each client. Used on the event loop alone."""

    def __init__(self, per_client: int) -> None:
        self._per_client = per_client
        self._under_way: Counter[str] = Counter()

    @contextmanager
    def one_more(self, client: str) -> Iterator[None]:
        """Count a request within the block.

        Raises:
            ApiError: 429, the client has its share.
        """
        if self._under_way[client] >= self._per_client:
            raise ApiError(
                429,
                f"{self._per_client} requests of yours are under way: ask again when one is answered",
                code="rate_limit_exceeded",
                retry_after_s=1,
                reason="share",
            )
        self._under_way[client] += 1
        try:
            yield
        finally:
            self._under_way[client] -= 1
            if not self._under_way[client]:
                del self._under_way[client]


def address_group(host: str) -> str:
    """Whom an address counts for: itself, of IPv6 its first 64 bits, which one customer has."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is None:
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)
