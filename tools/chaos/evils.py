"""What is done to a running training, and when: drawn from a seed, applied to real processes and a real file system."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tools.chaos.ranks import Group

MOMENTS = ("starting", "step", "saving")
KINDS = ("kill one", "kill all", "term", "stop one", "full disk")
EXIT_REQUEUE = 75


@dataclass(frozen=True)
class Evil:
    """One thing that happens to one start of the run."""

    kind: str
    moment: str
    rank: int
    delay: float
    """In [0, 1): how long after the moment has come, as a share of what that moment may take."""


def draw(rng: random.Random, kinds: tuple[str, ...], world_size: int) -> Evil:
    """One evil at random."""
    return Evil(rng.choice(kinds), rng.choice(MOMENTS), rng.randrange(world_size), rng.random())


def await_moment(evil: Evil, group: Group, stage: Path, timeout_s: float) -> bool:
    """Wait for the evil's moment; False where the ranks ended before it came."""
    reached: Callable[[], bool]
    begun_s, num_before, left_over = time.monotonic(), _num_lines(stage), set(_unfinished(stage))
    if evil.moment == "starting":
        reached = lambda: time.monotonic() - begun_s > 2 * evil.delay  # noqa: E731
    elif evil.moment == "step":
        reached = lambda: _num_lines(stage) > num_before + int(6 * evil.delay)  # noqa: E731
    else:
        reached = lambda: any(path not in left_over for path in _unfinished(stage))  # noqa: E731
    while time.monotonic() - begun_s < timeout_s and group.is_alive:
        if reached():
            return True
        time.sleep(0.001)
    return group.is_alive


def apply(evil: Evil, group: Group, volume: Path, timeout_s: float) -> str:
    """Do it; what went wrong with how the ranks took it, or ""."""
    everyone = list(range(len(group.processes)))
    match evil.kind:
        case "kill one":
            group.send(signal.SIGKILL, [evil.rank])
        case "kill all":
            group.send(signal.SIGKILL, everyone)
        case "term":
            group.send(signal.SIGTERM, everyone)
        case "stop one":
            group.send(signal.SIGSTOP, [evil.rank])
            if not group.wait(timeout_s, any_of_them=True):
                return "the others waited for a stopped rank"
            group.send(signal.SIGKILL, [evil.rank])
        case "full disk":
            _fill(volume, seconds=1.5 * evil.delay)
            group.send(signal.SIGKILL, everyone)
    if not group.wait(timeout_s):
        return f"ranks were left over after {evil.kind}"
    return ""


def mount_volume(folder: Path, megabytes: int) -> bool:
    """A small file system of its own, so that it can be filled; False where this user may not mount."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "sightline-chaos", str(folder)]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


def unmount_volume(folder: Path) -> None:
    """Give it back."""
    subprocess.run(["umount", "--lazy", str(folder)], check=False, capture_output=True)


def _fill(volume: Path, seconds: float) -> None:
    """Not a byte free on the volume for a while."""
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


def _num_lines(stage: Path) -> int:
    """Global batches that the first rank has entered into the ledger, over all starts."""
    return sum(file.read_bytes().count(b"\n") for file in (stage / "ledger").glob("attempt_*/rank_00000.jsonl"))
