"""A real run of two ranks, killed in every way and resumed, ends with the weights of one that nobody touched."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, cast

import pytest

from models.common.errors import InputError, run_cli
from tools.dev.chaos.__main__ import Chaos, Tally, main


@pytest.mark.slow
def test_one_kill_of_each_kind_changes_nothing(tmp_path: Path) -> None:
    assert run_cli(main, ["--out", str(tmp_path), "--kills", "7", "--each-kind", "--rank-timeout", "8"]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["weights_equal"]
    assert (report["lost"], report["repeated"], report["hangs"]) == (0, 0, 0)
    assert report["kills"] == 7
    assert report["refusal"] == "not tried" or "ermission denied" in report["refusal"]
    assert report["starts"] > 1


class FastMachine(Chaos):
    """Every run is over after so many kills."""

    def __init__(self, folder: Path, num_kills: int, kills_a_run: int) -> None:
        super().__init__(cast(Any, None), folder, num_kills)
        self.kills_a_run, self.kinds = kills_a_run, list[tuple[str, ...]]()
        self.killed: dict[str, int] = {}

    def _kill(self, rng: random.Random, kinds: tuple[str, ...], run: Path, tally: Tally) -> None:
        self.kinds.append(kinds)
        self.killed[run.name] = self.killed.get(run.name, 0) + 1
        tally.counts["kill one, step"] += self.kills_a_run > 0

    def _is_finished(self, run: Path) -> bool:
        return self.killed.get(run.name, 0) >= max(1, self.kills_a_run)

    def _finish(self, run: Path) -> float:
        return 1.0

    def _compare(self, undisturbed: Path, killed: Path) -> dict[str, Any]:
        return {"weights_equal": killed.name != "run1", "lost": 0, "repeated": 1, "steps": 10, "starts": 3}


def kill(chaos: FastMachine) -> dict[str, Any]:
    return chaos._kill_and_compare(random.Random(0), ("kill one", "term"), Path("calm"), True)


def test_a_machine_that_is_through_early_kills_another_run(tmp_path: Path) -> None:
    chaos = FastMachine(tmp_path, 5, kills_a_run=2)
    report = kill(chaos)
    assert (report["kills"], report["runs"], chaos.killed) == (5, 3, {"run0": 2, "run1": 2, "run2": 1})
    assert chaos.kinds == [("kill one",), ("term",), *[("kill one", "term")] * 3]
    assert report["weights_equal"] is False, "one of three differs"
    assert (report["repeated"], report["steps"], report["starts"]) == (3, 30, 9)


def test_runs_that_are_over_before_anything_happens_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="run0: was over before anything could be done to it"):
        kill(FastMachine(tmp_path, 5, kills_a_run=0))
