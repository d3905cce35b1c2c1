"""slurm/eval.sh on a real Slurm: every task of its nodes asks, a killed worker ends the job, the next start goes on."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.slurm.conftest import Checkout, copy_checkout
from tests.support.benchmarks import make_benchmark, repeat_questions
from tests.support.bundles import make_bundle
from tests.support.mini_slurm import MiniSlurm, wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

TIMES, BATCH_SIZE = 40, 1
WORDS = (
    "slurm/eval.sh bundle --task vqa --questions questions.json --annotations annotations.json --images images"
    f" --device cpu --batch-size {BATCH_SIZE}"
)


@pytest.fixture(scope="module")
def evaluated(cluster: MiniSlurm, tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A checkout with a random bundle and 160 questions to it."""
    folder = copy_checkout(tmp_path_factory.mktemp("evaluated"))
    make_bundle(folder / "bundle")
    repeat_questions(make_benchmark(folder), TIMES)
    return Checkout(folder, cluster)


def parts(folder: Path) -> dict[str, int]:
    """How many lines each worker's part has."""
    return {path.name[-20:-6]: path.read_bytes().count(b"\n") for path in folder.glob("*.part-*")}


def contents(folder: Path) -> dict[str, bytes]:
    """Everything but the facts, which hold the time."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.endswith(".facts.json")}


def test_a_killed_worker_ends_the_job_and_the_next_one_ends_in_the_undisturbed_bytes(evaluated: Checkout) -> None:
    cluster, killed, whole = evaluated.cluster, evaluated.folder / "killed", evaluated.folder / "whole"
    job = evaluated.submit(f"--nodes=2 {WORDS} --out killed/out.json")
    nodes = cluster.wait_for(job, "RUNNING")["NodeList"]
    second = cluster.nodes[cluster.ask("scontrol", "show", "hostnames", nodes).split()[1]]
    wait_until("both have answers", lambda: len(parts(killed)) == 2 and min(parts(killed).values()) > 2, every_s=0.05)
    assert set(parts(killed)) == {"00000-of-00002", "00001-of-00002"}
    second.run("pkill", "-9", "-f", "^[^ ]*python -m eval.run")
    assert cluster.wait_for(job, "FAILED", "COMPLETED")["JobState"] == "FAILED", evaluated.log(job)
    wait_until("no process is left", lambda: not any(cluster.processes().values()))
    assert not (killed / "out.json").exists()
    kept = sum(parts(killed).values()) - 2

    jobs = [
        evaluated.submit(f"--nodes=3 {WORDS} --out killed/out.json"),
        evaluated.submit(f"--nodes=1 {WORDS} --out whole/out.json"),
    ]
    for number in jobs:
        assert cluster.wait_for(number, "FAILED", "COMPLETED")["JobState"] == "COMPLETED", evaluated.log(number)
    said = re.search(rf"vqa: (\d+) of {4 * TIMES} answers are there", evaluated.log(jobs[0]))
    assert said is not None
    assert BATCH_SIZE * kept <= int(said[1]) < 4 * TIMES, "the two others may have begun before the first one looks"
    assert contents(killed) == contents(whole)
    (result,) = json.loads((whole / "out.json").read_text())["results"]
    assert result["num_samples"] == 4 * TIMES
