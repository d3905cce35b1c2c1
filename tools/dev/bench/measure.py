"""Compares two ways of doing the same work on a noisy machine, and writes the result.

Owns alternation, medians, the A/A check, the table and `runs/bench/NAME.json`. The work itself is the caller's.

Ours and the peer alternate (peer, ours, ours, peer) so that a slow minute affects both; the ratio is the median over
rounds. In the A/A check the peer runs against itself: the deviation of its ratio from 1 is the noise of the figures.
"""

from __future__ import annotations

import importlib.metadata
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

from models.common.files import write_json

Work = Callable[[], float]
"""Runs once and returns its rate (more is better)."""


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison as it is printed and written: ours, the peer's, their ratio and what was measured where."""

    what: str
    ours: float
    peer: float
    ratio: float
    unit: str
    device: str
    versions: dict[str, str]
    date: str


def per_core_second(work: Callable[[], int]) -> Work:
    """Rate of single-threaded work in units per second of its own CPU time, which other processes disturb least."""

    def rate() -> float:
        start = time.thread_time()
        count = work()
        return count / (time.thread_time() - start)

    return rate


def compare(what: str, unit: str, ours: Work, peer: Work, *, rounds: int, packages: Sequence[str]) -> Row:
    """Measure both in turns, so that a machine that slows down slows both, and compare medians."""
    ours(), peer()  # caches fill, lazy imports happen
    our_rates: list[float] = []
    peer_rates: list[float] = []
    for _ in range(rounds):
        peer_rates.append(peer())
        our_rates += [ours(), ours()]
        peer_rates.append(peer())
    pairs = zip(our_rates, peer_rates, strict=True)
    return row(
        what,
        unit,
        statistics.median(our_rates),
        statistics.median(peer_rates),
        packages,
        ratio=statistics.median(one / other for one, other in pairs),
    )


def row(what: str, unit: str, ours: float, peer: float, packages: Sequence[str], *, ratio: float | None = None) -> Row:
    """A line with this machine's name, the packages' versions and the time."""
    versions = {name: importlib.metadata.version(name) for name in packages} | {"python": platform.python_version()}
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return Row(what, ours, peer, ours / peer if ratio is None else ratio, unit, device(), versions, now)


def device() -> str:
    """The processor's name, from the system."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def report(name: str, rows: Sequence[Row], folder: Path = Path("runs/bench")) -> Path:
    """Print the table and write it to runs/bench/NAME.json."""
    width = max(len(line.what) for line in rows)
    print(f"{'':{width}}  {'ours':>10}  {'peer':>10}  {'ratio':>6}  unit")
    for line in rows:
        print(f"{line.what:{width}}  {line.ours:10.4g}  {line.peer:10.4g}  {line.ratio:6.2f}  {line.unit}")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    write_json(path, [asdict(line) for line in rows])
    print(f"{device()}; written to {path}")
    return path
