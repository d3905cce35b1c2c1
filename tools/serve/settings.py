"""What the server takes, how much at once and how long it goes on; the command line sets it."""

from __future__ import annotations

from dataclasses import dataclass, field

MEGABYTE = 1_000_000


@dataclass(frozen=True)
class RequestLimits:
    """What one request may hold and ask for.

    `max_body_bytes` holds a file of `data_pipeline.limits.MAX_BYTES` in base64. Bodies larger than `small_body_bytes`
    wait until the bodies that are being read or decoded leave room: together they take a quarter of `picture_bytes`.
    """

    max_body_bytes: int = 70 * MEGABYTE
    small_body_bytes: int = MEGABYTE
    picture_bytes: int = 1000 * MEGABYTE
    max_pixels: int = 25_000_000
    max_images: int = 8
    default_tokens: int = 256
    max_tokens: int = 4096
    fetches: bool = False


@dataclass(frozen=True)
class Load:
    """How many requests wait and are answered at once, and how many answers are kept."""

    rows: int = 16
    waiting: int = 64
    per_client: int = 32
    answers: int = 0
    """Whole answers that are kept, and given again to the same question with the same decoding before it waits."""


@dataclass(frozen=True)
class Times:
    """How long a body, the queue, an answer and the answers after SIGTERM may take, in seconds."""

    body_s: float = 60.0
    queue_s: float = 60.0
    answer_s: float = 300.0
    grace_s: float = 30.0


@dataclass(frozen=True)
class Access:
    """Who may ask, and under which names."""

    hosts: tuple[str, ...] = ()
    """Names under which it is asked, beside addresses, localhost and the machine's own; ("*",) is any."""
    origins: tuple[str, ...] = ()
    """Other sites whose pages may ask it in a browser."""


@dataclass(frozen=True)
class Settings:
    """See `sightline serve --help`."""

    model: str
    limits: RequestLimits = field(default_factory=RequestLimits)
    load: Load = field(default_factory=Load)
    times: Times = field(default_factory=Times)
    access: Access = field(default_factory=Access)
