"""The job scripts on a real Slurm: a chain to a bundle that answers, and a run through everything that can happen.

Both train the same recipe on two nodes; the chain's is undisturbed, and the other must come to the same weights.
"""

from __future__ import annotations

import json
import shlex
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import sightline
from tests.slurm.conftest import Checkout
from tests.support.mini_slurm import MiniSlurm, wait_until
from tools import audit
from trainer.checkpoint.initial_weights import finished_checkpoint
from trainer.checkpoint.reader import CheckpointReader
from trainer.ledger import blocks

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

STEPS = 100
WORDS = shlex.join(
    [
        "recipes/llava15_tiny.yaml",
        f"stages.align.duration={{unit: steps, count: {STEPS}}}",
        "stages.align.batch={global_rows: 4, micro_rows: 2}",
        "stages.align.checkpoint={every_steps: 2, keep: 2}",
        "stages.align.guard.rank_timeout_s=300",
        "stages.lora.duration={unit: steps, count: 40}",
        "stages.lora.batch={global_rows: 4, micro_rows: 2}",
        "tracking.log_every_steps=1",
    ]
)


@pytest.fixture(scope="session")
def chain(checkout: Checkout) -> Path:
    """The run that `slurm/chain.sh` made, two nodes of one rank each: align, LoRA, a bundle, its scores."""
    world = checkout.folder / "runs" / "quickstart" / "world" / "held_out"
    (checkout.folder / "suite.yaml").write_text(
        f"- {{kind: vqa, questions: {world}/questions.json, annotations: {world}/annotations.json,"
        f" images: {world}/images, limit: 4}}\n"
    )
    printed = checkout.type(f"slurm/chain.sh --nodes 2 --suite suite.yaml {WORDS}")
    lines = [line.split() for line in printed.splitlines()[-4:]]
    assert [name for name, _ in lines] == ["align", "lora", "bundle", "eval"], printed
    jobs = [job for _, job in lines]
    assert checkout.cluster.job(jobs[3])["Dependency"].startswith(f"afterok:{jobs[2]}")
    _stop_once(checkout, jobs[1])
    for job in jobs:
        found = checkout.cluster.wait_for(job, "COMPLETED", "FAILED", "CANCELLED")
        assert found["JobState"] == "COMPLETED", checkout.log(job)
    return checkout.folder / "runs" / "quickstart"


def _stop_once(checkout: Checkout, lora: str) -> None:
    """The second stage, under deepspeed's launcher, is told that its time is up; what waits for it goes on waiting."""
    cluster, run = checkout.cluster, checkout.folder / "runs" / "quickstart"
    cluster.wait_for(lora, "RUNNING")
    wait_until("the second stage trains", lambda: num_lines(run / "lora") > 1)
    cluster.ask("scancel", "--signal=USR1", lora)
    cluster.start_now(lora, restarts=1)
    assert "ranks ended with 75; queues itself again" in checkout.log(lora)


def num_lines(stage: Path) -> int:
    """Global batches in the first rank's ledger, over all starts."""
    return sum(blocks.num_lines(file) for file in stage.glob("ledger/attempt_*/rank_00000.*"))


def test_the_chain_ends_in_a_bundle_that_answers(chain: Path, cluster: MiniSlurm) -> None:
    assert finished_checkpoint(chain, "align") == chain / "align" / "checkpoints" / f"step_{STEPS:06d}"
    assert finished_checkpoint(chain, "lora") is not None
    scores = json.loads((chain / "eval" / "bundle.json").read_text())
    assert "vqa" in json.dumps(scores)
    image = next((chain / "world" / "held_out" / "images").iterdir())
    assert isinstance(sightline.load(chain / "bundle").chat(image, "What is at the top left?"), str)
    for rank, node in enumerate(("node1", "node2")):
        for stage in ("align", "lora"):
            log = (chain / stage / "logs" / f"rank_{rank:05d}.log").read_text()
            assert f"rank {rank} on {node}" in log
    wait_until("no process is left", lambda: not any(cluster.processes().values()))


def test_what_a_job_ran_is_kept_with_the_run(chain: Path) -> None:
    (job,) = (path.parent for path in chain.glob("jobs/*/job.json") if json.loads(path.read_text())["stage"] == "align")
    assert (job / "recipe.yaml").read_text() == (chain.parents[1] / "recipes" / "llava15_tiny.yaml").read_text()
    assert (job / "trainer" / "main.py").is_file()
    assert not (job / "slurm" / "site.env").exists()


class Run:
    """A training run on the cluster that a test disturbs."""

    def __init__(self, directory: Path, checkout: Checkout) -> None:
        self.directory, self._checkout, self._cluster = directory, checkout, checkout.cluster
        self.stage = directory / "align"
        self.job = ""

    def submit(self, nodes: int = 2) -> None:
        words = f"--nodes={nodes} slurm/stage1.sh {WORDS} {shlex.quote(f'run={self.directory}')}"
        self.job = self._checkout.submit(words)
        self._cluster.wait_for(self.job, "RUNNING")

    def steps(self) -> int:
        return num_lines(self.stage)

    def train(self, steps: int = 3) -> list[str]:
        """Wait until this start has trained so many steps; the job's nodes."""
        goal = self.steps() + steps
        wait_until(f"step {goal}", lambda: self.steps() >= goal, every_s=0.005)
        return self._cluster.ask("scontrol", "show", "hostnames", self._cluster.job(self.job)["NodeList"]).split()

    def is_saving(self) -> bool:
        """Whether a checkpoint is being written at this moment."""
        return any(self.stage.glob("checkpoints/.step_*"))

    @property
    def log(self) -> str:
        return self._checkout.log(self.job)


def test_a_run_comes_to_its_end_through_everything(
    chain: Path, checkout: Checkout, cluster: MiniSlurm, volume: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(volume / "run", checkout)
    _one_job_until_it_is_cancelled(run, checkout, cluster, volume)
    for name in ("node2", "node3"):
        if not cluster.nodes[name].pid:
            cluster.boot(name)
    cluster.wait_for_nodes("idle", *cluster.nodes)
    _another_job_to_the_end(run, cluster)

    undisturbed, disturbed = (CheckpointReader.open(_finished(directory)) for directory in (chain, run.directory))
    assert disturbed.names() == undisturbed.names()
    for name in undisturbed.names():
        assert torch.equal(disturbed.weight(name), undisturbed.weight(name)), name
    assert audit.main([str(run.directory)]) == 0, capsys.readouterr().out
    assert not (run.directory / "lock.json").exists()
    wait_until("no process is left", lambda: not any(cluster.processes().values()))


def test_started_again_with_another_number_of_nodes_it_goes_on(
    chain: Path, checkout: Checkout, cluster: MiniSlurm, volume: Path
) -> None:
    run = Run(volume / "elastic", checkout)
    run.submit()
    run.train()
    cluster.ask("scancel", run.job)
    cluster.wait_for(run.job, "CANCELLED")
    run.submit(nodes=1)
    cluster.wait_for(run.job, "COMPLETED")
    undisturbed, elastic = (CheckpointReader.open(_finished(directory)) for directory in (chain, run.directory))
    for name in undisturbed.names():
        torch.testing.assert_close(elastic.weight(name), undisturbed.weight(name), rtol=1e-2, atol=1e-3)
    assert audit.main([str(run.directory)]) == 0
    attempts = sorted(run.stage.glob("ledger/attempt_*/attempt.json"))
    assert [json.loads(file.read_text())["world_size"] for file in attempts] == [2, 1]


def _one_job_until_it_is_cancelled(run: Run, checkout: Checkout, cluster: MiniSlurm, volume: Path) -> None:
    run.submit()
    run.train()
    cluster.kill_slurmd("node2")
    cluster.stop_controller()
    with _no_byte_free(volume):
        run_on = run.steps() + 3
        wait_until("training goes on", lambda: run.steps() >= run_on)
    cluster.start_slurmd("node2")
    cluster.start_controller()
    run.train(1)
    cluster.ask("scancel", "--signal=USR1", run.job)  # as Slurm does before the job's end
    cluster.start_now(run.job, restarts=1)

    run.train()
    urgent = checkout.submit("--partition=urgent --nodes=4 --exclusive --wrap='sleep 1' --output=/dev/null")
    cluster.wait_for(urgent, "COMPLETED")
    cluster.start_now(run.job, restarts=2)

    nodes = run.train()
    cluster.nodes[nodes[1]].run("pkill", f"-{int(signal.SIGKILL)}", "-f", "^python")
    cluster.start_now(run.job, restarts=3)
    assert f"excluded: {nodes[1]}" in run.log

    left = run.train()
    assert nodes[1] not in left
    cluster.nodes[left[1]].power_off()
    cluster.declare_down(left[1])
    cluster.start_now(run.job, restarts=4)
    assert f"excluded: {left[1]}" in run.log

    run.train()
    cluster.ask("scancel", run.job)
    cluster.wait_for(run.job, "CANCELLED")
    wait_until("the job says why it ends", lambda: "Slurm has ended the job" in run.log)
    cluster.boot(left[1])


def _another_job_to_the_end(run: Run, cluster: MiniSlurm) -> None:
    run.submit()
    first, _ = run.train()
    wait_until("a checkpoint is being written", run.is_saving, every_s=0.0005)
    cluster.nodes[first].power_off()
    cluster.declare_down(first)
    cluster.start_now(run.job, restarts=1)
    cluster.boot(first)

    cut_off, _ = run.train()
    cluster.nodes[cut_off].link("down")
    cluster.declare_down(cut_off)
    cluster.start_now(run.job, restarts=2)
    run.train()
    assert cluster.nodes[cut_off].processes(), "the node that was cut off has not gone on by itself"
    first_log = run.stage / "logs" / "rank_00000.log"
    wait_until("the old rank stops", lambda: "another start has taken this run over" in first_log.read_text())
    cluster.nodes[cut_off].link("up")
    cluster.kill_slurmd(cut_off)  # at its start it hears at once which jobs it should not have any more
    cluster.start_slurmd(cut_off)

    assert cluster.wait_for(run.job, "COMPLETED", "FAILED")["JobState"] == "COMPLETED", run.log
    cluster.ask("scontrol", "requeue", run.job)
    cluster.start_now(run.job, restarts=3)
    cluster.wait_for(run.job, "COMPLETED")
    assert "finished already" in run.log


@contextmanager
def _no_byte_free(volume: Path) -> Iterator[None]:
    ballast = volume / "ballast"
    with ballast.open("wb", buffering=0) as stream:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    stream.write(bytes(size))
            except OSError:
                continue
        yield
    ballast.unlink()


def _finished(run: Path) -> Path:
    checkpoint = finished_checkpoint(run, "align")
    assert checkpoint is not None
    return checkpoint
