"""`make chaos`: kills a small real run again and again, and compares it with one that nobody touched.

Writes OUT/report.json: {"kills", "weights_equal", "lost", "repeated", "hangs", "seconds", ...}; exit code 0 when the
weights are the same bit for bit, the audit is clean and nothing hung.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from models.errors import InputError, run_cli
from models.files import write_json
from tools.chaos.evils import EXIT_REQUEUE, KINDS, apply, await_moment, draw, mount_volume, unmount_volume
from tools.chaos.ranks import Group, server
from tools.chaos.world import STAGE, make_world, words

WORLD_SIZE = 2
STEPS_PER_KILL = 3
VOLUME_MB = 24


def main(argv: list[str]) -> int:
    """Run it."""
    parser = argparse.ArgumentParser(prog="python -m tools.chaos", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/chaos"), help="default %(default)s")
    parser.add_argument("--kills", type=int, default=50, help="default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of kinds and moments (default %(default)s)")
    parser.add_argument("--rank-timeout", type=float, default=12.0, help="seconds until a rank counts as hung")
    parser.add_argument("--each-kind", action="store_true", help="every kind once before chance has its way")
    arguments = parser.parse_args(argv)
    started_s = time.monotonic()
    make_world(arguments.out)
    chaos = Chaos(server(), arguments.out.resolve(), arguments.kills, arguments.rank_timeout)
    report = chaos.run(random.Random(arguments.seed), each_kind=arguments.each_kind)
    report["seconds"] = round(time.monotonic() - started_s, 1)
    write_json(arguments.out / "report.json", report)
    for name, value in report.items():
        print(f"{name}: {value}")
    return 0 if report["weights_equal"] and not (report["lost"] or report["repeated"] or report["hangs"]) else 1


class Chaos:
    """Two runs of the same recipe: one undisturbed, one that is killed."""

    def __init__(self, context: ForkServerContext, folder: Path, num_kills: int, rank_timeout_s: float) -> None:
        self._context, self._folder, self._num_kills = context, folder, num_kills
        self._rank_timeout_s = rank_timeout_s
        self._volume = folder / "volume"
        self._steps = STEPS_PER_KILL * num_kills + 4
        self._limit_s = 2 * rank_timeout_s + 30

    def run(self, rng: random.Random, *, each_kind: bool) -> dict[str, Any]:
        """Both runs, and what they say of each other."""
        calm = self._folder / "calm"
        self._finish(calm)
        unmount_volume(self._volume)
        can_fill = mount_volume(self._volume, VOLUME_MB)
        kinds = KINDS if can_fill else tuple(kind for kind in KINDS if kind != "full disk")
        if not can_fill:
            print("a full disk is left out: this user may not mount a small file system", file=sys.stderr)
        try:
            return self._kill_and_compare(rng, kinds, calm, each_kind)
        finally:
            unmount_volume(self._volume)

    def _kill_and_compare(
        self, rng: random.Random, kinds: tuple[str, ...], calm: Path, each_kind: bool
    ) -> dict[str, Any]:
        from tqdm import tqdm

        run = self._volume / "run"
        counts: Counter[str] = Counter()
        faults: list[str] = []
        for number in tqdm(range(self._num_kills), desc="kills", unit="kill"):
            pool = (kinds[number % len(kinds)],) if each_kind and number < len(kinds) else kinds
            evil = draw(rng, pool, WORLD_SIZE)
            group = Group.start(self._context, WORLD_SIZE, self._words(run), self._folder / "killed.log")
            fault = ""
            if await_moment(evil, group, run / STAGE, self._limit_s):
                fault = apply(evil, group, self._volume, self._limit_s)
                counts[f"{evil.kind}, {evil.moment}"] += 1
            group.kill()
            if fault:
                faults.append(f"{fault} ({evil})")
        self._finish(run)
        return self._compare(calm, run) | {
            "hangs": len(faults),
            "faults": faults,
            "kills": sum(counts.values()),
            "by_kind": dict(sorted(counts.items())),
        }

    def _words(self, run: Path) -> list[str]:
        return words(self._folder, run, steps=self._steps, rank_timeout_s=self._rank_timeout_s)

    def _finish(self, run: Path) -> None:
        """Start the run until it is finished; a start that a signal ended is started again."""
        for _ in range(3):
            group = Group.start(self._context, WORLD_SIZE, self._words(run), self._folder / f"{run.name}.log")
            if not group.wait(self._limit_s + 2 * self._steps):
                group.kill()
                raise InputError(f"{run}: did not finish; see {self._folder / run.name}.log")
            if group.codes() == [0] * WORLD_SIZE:
                return
            if set(group.codes()) != {EXIT_REQUEUE}:
                break
        raise InputError(f"{run}: ended with {group.codes()}; see {self._folder / run.name}.log")

    def _compare(self, calm: Path, killed: Path) -> dict[str, Any]:
        import torch

        from trainer.audit import audit
        from trainer.checkpoint import CheckpointReader
        from trainer.weights import finished_checkpoint

        readers = [CheckpointReader(found) for run in (calm, killed) if (found := finished_checkpoint(run, STAGE))]
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
            "starts": account.num_attempts,
        }


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
