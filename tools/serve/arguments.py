"""The command line of `sightline serve` and `sightline demo`: one set of words, and what cannot be told apart later."""

from __future__ import annotations

import argparse
import ipaddress
import re
from pathlib import Path

from models.common.errors import InputError
from tools.serve.settings import MEGABYTE, Access, Load, RequestLimits, Settings, Times

_ROOT_PATH = re.compile(r"(https?://[^/\s?#]+)?(/[\w.~%+-]+)*/?")
_ORIGIN = re.compile(r"https?://[^/\s?#@]+")


def add_address(parser: argparse.ArgumentParser, *, port: int | None, ports: str) -> None:
    """Where it listens, and who may ask."""
    parser.add_argument("bundle", type=Path, help="a folder that tools.merge or tools.quantize made")
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda or cuda:N")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=port, help=f"port to listen on (default: {ports})")
    parser.add_argument("--root-path", default="", metavar="/SUB", help="the path that a proxy serves it under")
    parser.add_argument("--api-keys", type=Path, metavar="FILE", help="lines NAME KEY; others are answered 401")
    parser.add_argument("--without-keys", action="store_true", help="let everybody in who reaches --host")
    parser.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME", help="a name it is asked under, beside addresses"
    )
    parser.add_argument(
        "--cors", action="append", default=[], metavar="ORIGIN", help="https://SITE whose pages may ask in a browser"
    )
    parser.add_argument("--name", help="the model's name in the API (default: the folder's)")
    parser.add_argument("--examples", type=Path, metavar="DIR", help="a folder of images to offer on the page")


def add_limits(parser: argparse.ArgumentParser) -> None:
    """What it takes, and how long."""
    limits, load, times = RequestLimits(), Load(), Times()
    add = parser.add_argument
    add("--rows", type=int, default=load.rows, help="answers that are written at once (default: %(default)s)")
    add("--waiting", type=int, default=load.waiting, help="further requests that may wait (default: %(default)s)")
    add("--per-client", type=int, default=load.per_client, help="requests of one key or address (default: %(default)s)")
    add("--cache-gb", type=float, help="memory for keys and values (default: a share of what is free)")
    add("--picture-gb", type=float, default=1.0, help="memory for decoding pictures (default: %(default)s)")
    add("--max-megapixels", type=float, default=25.0, help="of one picture (default: %(default)s)")
    add("--max-tokens", type=int, default=limits.max_tokens, help="longest answer (default: %(default)s)")
    add("--queue-timeout", type=float, default=times.queue_s, help="seconds until an answer begins, else 503")
    add("--timeout", type=float, default=times.answer_s, help="seconds that an answer may take (default: %(default)s)")
    add("--grace", type=float, default=times.grace_s, help="seconds that answers have after SIGTERM")
    add("--answers", type=int, default=load.answers, help="answers kept for the same question (default: %(default)s)")
    add("--fetch", action="store_true", help="fetch pictures from public http(s) addresses")


def settings_of(arguments: argparse.Namespace) -> Settings:
    """The settings that a command line says.

    Raises:
        InputError: a value out of its bounds, or an open door that nobody asked for.
    """
    _check(arguments)
    return Settings(
        model=arguments.name or arguments.bundle.resolve().name,
        limits=RequestLimits(
            picture_bytes=int(arguments.picture_gb * 1000 * MEGABYTE),
            max_pixels=int(arguments.max_megapixels * 1_000_000),
            max_tokens=arguments.max_tokens,
            default_tokens=min(RequestLimits.default_tokens, arguments.max_tokens),
            fetches=arguments.fetch,
        ),
        load=Load(
            rows=arguments.rows,
            waiting=arguments.waiting,
            per_client=arguments.per_client,
            answers=arguments.answers,
        ),
        times=Times(queue_s=arguments.queue_timeout, answer_s=arguments.timeout, grace_s=arguments.grace),
        access=Access(
            hosts=tuple(arguments.allow_host),
            origins=tuple(origin.rstrip("/") for origin in arguments.cors),
        ),
    )


def _check(arguments: argparse.Namespace) -> None:
    if arguments.port is not None and not 0 < arguments.port < 65536:
        raise InputError(f"--port {arguments.port} is no port: take one from 1 to 65535")
    if arguments.root_path and not _ROOT_PATH.fullmatch(arguments.root_path):
        raise InputError(
            f"--root-path {arguments.root_path}: give a path such as /demo, or the whole address https://HOST/demo"
        )
    arguments.root_path = arguments.root_path.rstrip("/")
    if arguments.examples is not None and not arguments.examples.is_dir():
        raise InputError(f"there is no folder {arguments.examples}: --examples takes a folder of images")
    for origin in arguments.cors:
        if not _ORIGIN.fullmatch(origin.rstrip("/")):
            raise InputError(f"--cors {origin}: give a site such as https://example.org, without a path")
    positive = ("rows", "per_client", "max_tokens", "picture_gb", "max_megapixels", "queue_timeout", "timeout")
    for name in (*positive, *(("cache_gb",) if arguments.cache_gb is not None else ())):
        if not getattr(arguments, name) > 0:
            raise InputError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: take a number above 0")
    for name in ("waiting", "grace", "answers"):
        if not getattr(arguments, name) >= 0:
            raise InputError(f"--{name} {getattr(arguments, name)}: take 0 or more")
    if not is_loopback(arguments.host) and arguments.api_keys is None and not arguments.without_keys:
        raise InputError(
            f"--host {arguments.host} is reached by others: give --api-keys FILE, or say --without-keys if a proxy"
            " or the network keeps strangers out"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
