"""Faults and their times: drawn from a seed, injected into real processes and files of a training run."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tools.dev.chaos.machine import set_clock
from trainer.local_ranks import RankGroup

MOMENTS = ("starting", "step", "saving")
KINDS = ("kill one", "kill all", "term", "stop one", "suspend all", "leap", "full disk")
HOURS = (-26.0, -1.0, 1.0, 26.0, 24.0 * 400)
"""By which a clock leaps."""


@dataclass(frozen=True)
class Fault:
    """One fault in one start of the run."""

    kind: str
    moment: str
    rank: int
    delay: float
    """Delay after the moment, in [0, 1), as a share of the moment's duration."""


def draw(rng: random.Random, kinds: tuple[str, ...], world_size: int) -> Fault:
    """A fault of one of these kinds, at a random moment, for a random rank."""
    return Fault(rng.choice(kinds), rng.choice(MOMENTS), rng.randrange(world_size), rng.random())


def await_moment(fault: Fault, group: RankGroup, stage: Path, timeout_s: float) -> bool:
    """Wait for the fault's moment; False where the ranks ended before it came."""
    reached: Callable[[], bool]
    begun_s, num_before, left_over = time.monotonic(), num_batches(stage), set(_unfinished(stage))
    if fault.moment == "starting":
        reached = lambda: time.monotonic() - begun_s > 2 * fault.delay  # noqa: E731
    elif fault.moment == "step":
        reached = lambda: num_batches(stage) > num_before + int(6 * fault.delay)  # noqa: E731
    else:
        reached = lambda: any(path not in left_over for path in _unfinished(stage))  # noqa: E731
    while time.monotonic() - begun_s < timeout_s and group.is_alive:
        if reached():
            return True
        time.sleep(0.001)
    return group.is_alive


@dataclass(frozen=True)
class Place:
    """Where a run is, for faults that need more than its processes."""

    volume: Path
    stage: Path
    clock: Path
    """Of `tools.dev.chaos.machine.OddMachine`."""
    rank_timeout_s: float


def inject(fault: Fault, group: RankGroup, place: Place, timeout_s: float) -> str:
    """Do it, and wait until the ranks have ended, or where it must not end them have gone on.

    Returns:
        How the ranks failed to do so within `timeout_s`, or "".
    """
    everyone = list(range(len(group.processes)))
    match fault.kind:
        case "kill one":
            group.send(signal.SIGKILL, [fault.rank])
        case "kill all":
            group.send(signal.SIGKILL, everyone)
        case "term":
            group.send(signal.SIGTERM, everyone)
        case "stop one":
            group.send(signal.SIGSTOP, [fault.rank])
            if not group.wait(timeout_s, ended=any):
                return "the others waited for a stopped rank"
            group.send(signal.SIGKILL, [fault.rank])
        case "suspend all":
            group.send(signal.SIGSTOP, everyone)
            time.sleep(1.5 * place.rank_timeout_s)
            group.send(signal.SIGCONT, everyone)
            complaint = _go_on(group, place.stage, timeout_s)
            group.send(signal.SIGKILL, everyone)
            if complaint:
                return f"{complaint} after they were suspended"
        case "leap":
            set_clock(place.clock, 3600 * HOURS[int(fault.delay * len(HOURS))])
            complaint = _go_on(group, place.stage, timeout_s)
            group.send(signal.SIGKILL, everyone)
            if complaint:
                return f"{complaint} after the clock leapt"
        case "full disk":
            _fill(place.volume, seconds=1.5 * fault.delay)
            group.send(signal.SIGKILL, everyone)
    if not group.wait(timeout_s):
        return f"ranks were left over after {fault.kind}"
    return ""


def mount_volume(folder: Path, megabytes: int) -> bool:
    """Mount a small file system that can be filled without harm; False where this user may not mount."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "sightline-chaos", str(folder)]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


def unmount_volume(folder: Path) -> None:
    """Unmount what `mount_volume` mounted; nothing happens where nothing is mounted."""
    subprocess.run(["umount", "--lazy", str(folder)], check=False, capture_output=True)


def num_batches(stage: Path) -> int:
    """Global batches that the first rank has entered into the ledger, over all starts."""
    from trainer.ledger.blocks import num_lines

    return sum(num_lines(file) for file in (stage / "ledger").glob("attempt_*/rank_00000.*"))


def _go_on(group: RankGroup, stage: Path, timeout_s: float) -> str:
    """Wait for another batch, or for the end of the run; how that did not come."""
    before, end_s = num_batches(stage), time.monotonic() + timeout_s
    while time.monotonic() < end_s:
        codes = group.codes()
        if num_batches(stage) > before or set(codes) == {0}:
            return ""
        if any(code not in (None, 0) for code in codes):
            return f"ranks ended with {codes}"
        time.sleep(0.02)
    return "ranks did not go on"


def _fill(volume: Path, seconds: float) -> None:
    """Fill the volume completely for this many seconds."""
    ballast = volume / "ballast"
    end_s = time.monotonic() + seconds
    with ballast.open("wb", buffering=0) as stream:
        while time.monotonic() < end_s:
            try:
                stream.write(bytes(1 << 16))
            except OSError:
                time.sleep(0.01)
    ballast.unlink()


def _unfinished(stage: Path) -> Iterator[Path]:
    """Checkpoints that are being written, or were when their writer was killed."""
    return (stage / "checkpoints").glob(".step_*")
