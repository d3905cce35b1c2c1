"""What the server takes and how long it goes on, in one value; the command line sets it."""

from __future__ import annotations

from dataclasses import dataclass

MEGABYTE = 1_000_000


@dataclass(frozen=True)
class Settings:
    """See `sightline serve --help`; times in seconds.

    `max_body_bytes` holds a file of `data_pipeline.limits.MAX_BYTES` in base64. Bodies larger than `small_body_bytes`
    wait until the bodies that are being read or decoded leave room: together they take a quarter of `picture_bytes`.
    """

    model: str
    rows: int = 16
    waiting: int = 64
    per_client: int = 32
    max_body_bytes: int = 70 * MEGABYTE
    small_body_bytes: int = MEGABYTE
    picture_bytes: int = 1000 * MEGABYTE
    max_pixels: int = 25_000_000
    max_images: int = 8
    default_tokens: int = 256
    max_tokens: int = 4096
    body_s: float = 60.0
    queue_s: float = 60.0
    answer_s: float = 300.0
    grace_s: float = 30.0
    answers: int = 0
    """Whole answers that are kept, and given again to the same question with the same decoding before it waits."""
    fetches: bool = False
    hosts: tuple[str, ...] = ()
    """Names under which it is asked, beside addresses, localhost and the machine's own; ("*",) is any."""
    origins: tuple[str, ...] = ()
    """Other sites whose pages may ask it in a browser."""
