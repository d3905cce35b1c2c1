"""`make chaos`: kills a small real run repeatedly, and compares it with an undisturbed one.

    an undisturbed run --> how long a start takes here
    a start by a user whom the run's directory refuses --> one line
    start, fault, start, fault, ... until the run is over; the next run, until every kill was made --> compare each

The runs that are killed are on an odd machine (`tools.dev.chaos.machine`): no hard links, and their shards
come from a server that breaks its answers.

Writes OUT/report.json: {"kills", "weights_equal", "lost", "repeated", "hangs", "seconds", ...}; exit code 0 when the
weights are the same bit for bit, the audit is clean, nothing hung and all kills were made.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from models.common.errors import InputError, run_cli
from models.common.exit_codes import ExitCode
from models.common.files import write_json

WORLD_SIZE = 2
STEPS_PER_KILL = 3
VOLUME_MB = 24
NOBODY = 65534
"""The user who owns what others may not touch."""
UNDISTURBED_TIMEOUT_S = 600.0
"""A limit on undisturbed starts, which only a hang reaches."""


def main(argv: list[str]) -> int:
    """Make both runs and the report; 0 where all claims hold, else 1."""
    parser = argparse.ArgumentParser(prog="python -m tools.chaos", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/chaos"), help="default %(default)s")
    parser.add_argument("--kills", type=int, default=50, help="default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of kinds and moments (default %(default)s)")
    parser.add_argument(
        "--rank-timeout",
        type=float,
        default=12.0,
        help="seconds until a rank counts as hung; more where a start takes longer than a third of that",
    )
    parser.add_argument("--each-kind", action="store_true", help="every kind once before chance has its way")
    arguments = parser.parse_args(argv)
    if arguments.kills < 1:
        raise InputError(f"--kills {arguments.kills}: at least 1")

    from tools.dev.chaos.world import make_world
    from trainer.local_ranks import fork_server

    started_s = time.monotonic()
    make_world(arguments.out)
    chaos = Chaos(fork_server(), arguments.out.resolve(), arguments.kills)
    report = chaos.run(random.Random(arguments.seed), arguments.rank_timeout, each_kind=arguments.each_kind)
    report["seconds"] = round(time.monotonic() - started_s, 1)
    write_json(arguments.out / "report.json", report)
    for name, value in report.items():
        print(f"{name}: {value}")
    is_sound = report["weights_equal"] and not (report["lost"] or report["repeated"] or report["hangs"])
    return 0 if is_sound and report["kills"] == arguments.kills else 1


@dataclass
class Tally:
    """The faults so far, and their results."""

    counts: Counter[str] = field(default_factory=Counter)
    complaints: list[str] = field(default_factory=list)

    @property
    def num_kills(self) -> int:
        """Faults that hit a run before its end."""
        return sum(self.counts.values())


class Chaos:
    """Runs of one recipe: one undisturbed, and as many others as `num_kills` kills need."""

    def __init__(self, context: ForkServerContext, folder: Path, num_kills: int) -> None:
        self._context, self._folder, self._num_kills = context, folder, num_kills
        self._volume, self._clock = folder / "volume", folder / "clock"
        self._address: str | None = None
        """Where the shards of the runs that are killed are served from."""
        self._steps = STEPS_PER_KILL * num_kills + 4
        self._rank_timeout_s = self._limit_s = UNDISTURBED_TIMEOUT_S

    def run(self, rng: random.Random, rank_timeout_s: float, *, each_kind: bool) -> dict[str, Any]:
        """Make the undisturbed run and the killed ones, and compare; the entries of report.json."""
        from tools.dev.chaos.faults import KINDS, mount_volume, unmount_volume
        from tools.dev.chaos.machine import broken_server, set_clock

        undisturbed = self._folder / "calm"
        shutil.rmtree(undisturbed, ignore_errors=True)  # an older program's weights may be others
        # A start is the longest time without a step, and takes longer on a machine with other work.
        self._rank_timeout_s = max(rank_timeout_s, 3 * self._finish(undisturbed))
        self._limit_s = 10 * self._rank_timeout_s + 60
        unmount_volume(self._volume)
        can_fill = mount_volume(self._volume, VOLUME_MB)
        kinds = KINDS if can_fill else tuple(kind for kind in KINDS if kind != "full disk")
        if not can_fill:
            print("a full disk is left out: this user may not mount a small file system", file=sys.stderr)
        set_clock(self._clock, 0.0)
        shutil.rmtree(self._folder / "cache", ignore_errors=True)
        try:
            refusal = self._try_another_user()
            with broken_server(self._folder) as self._address:
                report = self._kill_and_compare(rng, kinds, undisturbed, each_kind)
            return {**report, "refusal": refusal}
        finally:
            unmount_volume(self._volume)

    def _try_another_user(self) -> str:
        """What the ranks say to a user whom the run's directory refuses: one line, the same on all, and exit code 2.

        Raises:
            InputError: they end otherwise.
        """
        from tools.dev.chaos.machine import respect_owners

        if os.geteuid() != 0:
            print("another user's directory is left out: only root can start as somebody else", file=sys.stderr)
            return "not tried"
        run, log = self._folder / "theirs", self._folder / "theirs.log"
        run.mkdir(mode=0o700, exist_ok=True)
        os.chown(run, NOBODY, NOBODY)
        log.unlink(missing_ok=True)
        group = self._start(run, log, respect_owners)
        if not group.wait(self._limit_s):
            group.kill()
        lines = log.read_text(encoding="utf-8").splitlines()
        is_said = len(set(lines)) == 1 and lines[0].startswith("error: ") and "ermission denied" in lines[0]
        if group.codes() != [ExitCode.INPUT_ERROR] * WORLD_SIZE or not is_said:
            raise InputError(f"{run}: a directory of another user ended the ranks with {group.codes()}; see {log}")
        return lines[0]

    def _kill_and_compare(
        self, rng: random.Random, kinds: tuple[str, ...], undisturbed: Path, each_kind: bool
    ) -> dict[str, Any]:
        """Kill runs one after the other until every kill was made; a fast machine may finish one run earlier."""
        from tqdm import tqdm

        tally = Tally()
        found: list[dict[str, Any]] = []
        with tqdm(total=self._num_kills, desc="kills", unit="kill") as bar:
            while tally.num_kills < self._num_kills:
                run, before = self._volume / f"run{len(found)}", tally.num_kills
                while tally.num_kills < self._num_kills and not self._is_finished(run):
                    number = tally.num_kills
                    self._kill(rng, (kinds[number],) if each_kind and number < len(kinds) else kinds, run, tally)
                    bar.update(tally.num_kills - number)
                self._finish(run)
                found.append(self._compare(undisturbed, run))
                if tally.num_kills == before:
                    raise InputError(f"{run}: was over before anything could be done to it; take more --kills")
        return {
            "weights_equal": all(each["weights_equal"] for each in found),
            **{name: sum(each[name] for each in found) for name in ("lost", "repeated", "steps", "starts")},
            "runs": len(found),
            "hangs": len(tally.complaints),
            "faults": tally.complaints,
            "kills": tally.num_kills,
            "by_kind": dict(sorted(tally.counts.items())),
        }

    def _kill(self, rng: random.Random, kinds: tuple[str, ...], run: Path, tally: Tally) -> None:
        """Start the run and inject one fault of these kinds, if its moment comes before the run is over."""
        from tools.dev.chaos.faults import Place, await_moment, draw, inject
        from tools.dev.chaos.machine import OddMachine
        from tools.dev.chaos.world import STAGE

        fault, complaint = draw(rng, kinds, WORLD_SIZE), ""
        place = Place(self._volume, run / STAGE, self._clock, self._rank_timeout_s)
        group = self._start(run, self._folder / "killed.log", OddMachine(self._clock))
        if await_moment(fault, group, run / STAGE, self._limit_s):
            complaint = inject(fault, group, place, self._limit_s)
            tally.counts[f"{fault.kind}, {fault.moment}"] += 1
        group.kill()
        if complaint:
            tally.complaints.append(f"{complaint} ({fault})")

    def _start(self, run: Path, log: Path, prepare: Callable[[], None] | None = None) -> Any:
        from tools.dev.chaos.world import recipe_arguments
        from trainer.local_ranks import RankGroup

        arguments = recipe_arguments(
            self._folder, run, steps=self._steps, rank_timeout_s=self._rank_timeout_s, address=self._address
        )
        return RankGroup.start(self._context, WORLD_SIZE, arguments, log, prepare)

    def _is_finished(self, run: Path) -> bool:
        from tools.dev.chaos.world import STAGE
        from trainer.checkpoint.initial_weights import finished_checkpoint

        return finished_checkpoint(run, STAGE) is not None

    def _finish(self, run: Path) -> float:
        """Start the run until it is finished, again where a signal had ended it; the seconds to its first new step.

        Raises:
            InputError: it hung for the whole limit, or ended in another way.
        """
        from tools.dev.chaos.world import STAGE

        log, start_s = self._folder / f"{run.name}.log", 0.0
        for _ in range(3):
            group = self._start(run, log)
            start_s = self._follow(group, run / STAGE)
            if group.is_alive:
                group.kill()
                raise InputError(f"{run}: has stood still for {self._limit_s:.0f} s; see {log}")
            if group.codes() == [0] * WORLD_SIZE:
                return start_s
            if set(group.codes()) != {ExitCode.REQUEUE}:
                break
        raise InputError(f"{run}: ended with {group.codes()}; see {log}")

    def _follow(self, group: Any, stage: Path) -> float:
        """Wait until the ranks have ended, or have taken no step for the limit; the seconds to the first step."""
        from tools.dev.chaos.faults import num_batches

        begun_s = moved_s = time.monotonic()
        before = done = num_batches(stage)
        start_s = 0.0
        while not group.wait(0.2) and time.monotonic() - moved_s < self._limit_s:
            if (now := num_batches(stage)) != done:
                done, moved_s = now, time.monotonic()
                start_s = start_s or (moved_s - begun_s if done > before else 0.0)
        return start_s

    def _compare(self, undisturbed: Path, killed: Path) -> dict[str, Any]:
        """Weights against weights, and the killed run's own account of its samples."""
        import torch

        from tools.dev.chaos.world import STAGE
        from trainer.checkpoint.initial_weights import finished_checkpoint
        from trainer.checkpoint.reader import CheckpointReader
        from trainer.ledger.audit import audit

        readers = [
            CheckpointReader.open(found) for run in (undisturbed, killed) if (found := finished_checkpoint(run, STAGE))
        ]
        left, right = readers
        names = sorted(left.names())
        equal = names == sorted(right.names()) and all(
            torch.equal(left.weight(name), right.weight(name)) for name in names
        )
        account = audit(killed / STAGE)
        return {
            "weights_equal": equal,
            "lost": len(account.lost) + len(account.missing_batches),
            "repeated": len(account.repeated),
            "steps": account.num_steps,
            "starts": account.num_restarts,
        }


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
