"""The job scripts without Slurm: they parse, are explained, and hand their words to the right commands.

Stand-ins for Slurm's commands print what they are given; a real Slurm is in the other files.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from models.common.exit_codes import ExitCode
from tests.slurm.conftest import copy_checkout
from tests.support.paths import REPOSITORY
from tools.inspect import snapshot

SCRIPTS = sorted((REPOSITORY / "slurm").glob("*.sh"))
OBVIOUS = {
    "job-name",
    "nodes",
    "ntasks",
    "cpus-per-task",
    "gpus-per-node",
    "time",
    "mem",
    "requeue",
    "open-mode",
    "output",
}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_it_parses_and_every_option_is_explained(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    if shutil.which("shellcheck") is not None:
        subprocess.run(["shellcheck", "--external-sources", str(script)], check=True, cwd=REPOSITORY)
    before = ""
    for line in script.read_text().splitlines():
        option = re.match(r"#SBATCH --([a-z-]+)", line)
        if option is not None and option[1] not in OBVIOUS:
            assert before.startswith("# "), f"{script.name}: --{option[1]} without a comment above it"
        if option is None or not before.startswith("# "):
            before = line


def test_the_scripts_and_the_trainer_mean_the_same_by_an_exit_code() -> None:
    script = (REPOSITORY / "slurm" / "exit_codes.sh").read_text()
    numbers = {name: int(number) for name, number in re.findall(r"^EXIT_([A-Z_]+)=(\d+)", script, re.MULTILINE)}
    assert numbers == {code.name: code.value for code in ExitCode if code != ExitCode.KEYBOARD}
    for name in ("launch.sh", "requeue.sh"):
        text = (REPOSITORY / "slurm" / name).read_text()
        assert set(re.findall(r"\bEXIT_([A-Z_]+)", text)) <= numbers.keys()
        assert not re.search(r"\b(75|76|77)\b", text)


class Login:
    """A checkout where Slurm's commands only say what they were asked."""

    def __init__(self, folder: Path) -> None:
        self.checkout = copy_checkout(folder / "checkout")
        self._shims = folder / "shims"
        self._shims.mkdir()
        self.calls = folder / "calls"
        self.shim("srun", 'case "$*" in *tools.snapshot*) while [ "$1" != python ]; do shift; done; exec "$@" ;; esac')
        hostnames = "echo node7; sleep 0.1; echo node8"  # a reader that ends after the first would break its pipe
        self.shim("scontrol", f'if [ "$2" = hostnames ]; then {hostnames}; else echo " JobState=FAILED"; fi')
        self.shim("squeue", "echo 2031-01-01T00:00:00")
        self.shim("sinfo", "echo idle")

    def shim(self, name: str, body: str) -> None:
        record = f'case {name} in srun | sbatch) printf "%s\\n" "$*" >> {self.calls} ;; esac'
        (self._shims / name).write_text(f"#!/bin/bash\n{record}\n{body}\n")
        (self._shims / name).chmod(0o755)

    def run(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        path = f"{self._shims}:{os.environ['PATH']}"
        job = {
            "SLURM_JOB_NODELIST": "node[7-8]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_ID": "41",
            "SLURM_GPUS_ON_NODE": "4",
        }
        site = self.checkout / "slurm" / "site.env"
        site.write_text(site.read_text() + f"SIGHTLINE_SETUP='export PATH=\"{path}:$PATH\"'\n")
        return subprocess.run(
            ["bash", *words], cwd=self.checkout, capture_output=True, text=True, check=False,
            env={**os.environ, "PATH": path, **job, "SLURM_CPUS_ON_NODE": "64", **environment},
        )  # fmt: skip

    def site(self, line: str) -> None:
        with (self.checkout / "slurm" / "site.env").open("a") as stream:
            stream.write(line + "\n")

    def started(self) -> str:
        return self.calls.read_text().splitlines()[-1]


@pytest.fixture
def login(tmp_path: Path) -> Login:
    return Login(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("script", "stage"), [("stage1.sh", "align"), ("stage2.sh", "lora")])
def test_one_task_a_gpu_from_a_copy_of_the_code(login: Login, script: str, stage: str) -> None:
    run = login.checkout / "runs" / "x"
    done = login.run(f"slurm/{script}", "recipes/llava15_tiny.yaml", f"run={run}", "seed=3")
    job = run / "jobs" / "41"
    started = login.started()
    assert started.startswith("--nodes=2 --ntasks-per-node=4 --cpus-per-task=16 "), done.stdout + done.stderr
    assert " --distribution=block:block --cpu-bind=cores " in started, "neighbouring ranks on one socket"
    words = f"{job}/recipe.yaml --stage {stage} run={run} seed=3"
    assert started.endswith(f"bash {job}/slurm/launch.sh task python {job}/trainer/main.py {words}")
    assert json.loads((job / "job.json").read_text())["overrides"] == [f"run={run}", "seed=3"]


@pytest.mark.slow
@pytest.mark.parametrize(("job", "restart"), [("41", "0"), ("2857", "0"), ("2857", "1"), ("4294967295", "99")])
def test_the_ranks_meet_below_the_ports_that_clients_get(login: Login, job: str, restart: str) -> None:
    login.run("slurm/stage1.sh", "recipes/llava15_tiny.yaml", SLURM_JOB_ID=job)
    login.shim("srun", f'echo "$MASTER_PORT $PYTORCH_CUDA_ALLOC_CONF" > {login.checkout}/met')
    login.site("export PYTORCH_CUDA_ALLOC_CONF=backend:native")
    launcher = login.checkout / "runs" / "quickstart" / "jobs" / job / "slurm" / "launch.sh"
    words = ("train", "align", "recipes/llava15_tiny.yaml")
    login.run(str(launcher), *words, SLURM_JOB_ID=job, SLURM_RESTART_COUNT=restart)
    port, said = (login.checkout / "met").read_text().split()
    assert 10_000 <= int(port) < 30_000
    assert said == "backend:native"


@pytest.mark.slow
def test_the_quickstarts_recipe_is_the_default(login: Login) -> None:
    login.run("slurm/stage1.sh")
    assert (login.checkout / "runs" / "quickstart" / "jobs" / "41" / "recipe.yaml").is_file()


@pytest.mark.slow
def test_a_recipe_that_cannot_be_started_stops_in_a_line(login: Login) -> None:
    done = login.run("slurm/stage1.sh", "recipes/llava15_tiny.yaml", "--stage", "none")
    assert done.returncode == 2
    assert "it has align, lora" in done.stderr
    assert "stopped: this recipe cannot be started" in done.stdout


@pytest.mark.slow
def test_containers_are_a_choice_of_the_site(login: Login) -> None:
    login.site("SIGHTLINE_SRUN=(--container-image=/i.sqsh) SIGHTLINE_WRAP=(apptainer exec --nv s.sif)")
    login.run("slurm/eval.sh", "runs/bundle", "--out", "x y.json")
    expected = "--container-image=/i.sqsh apptainer exec --nv s.sif python -m eval.run runs/bundle --out x y.json"
    workers = "--nodes=2 --ntasks-per-node=4 --cpus-per-task=16 --kill-on-bad-exit=1"
    assert login.started() == f"{workers} {expected}"
    login.shim("srun", f"echo {login.checkout}/runs/x/jobs/41; cp -r {_copied(login)} {login.checkout}/runs/x/jobs/41")
    login.run("slurm/stage1.sh", "recipes/llava15_tiny.yaml", f"run={login.checkout}/runs/x")
    assert re.search(
        r" --container-image=/i.sqsh bash \S+/launch.sh task apptainer exec --nv s.sif python ", login.started()
    )


def _copied(login: Login) -> Path:
    """A job's copy, made beside its place: a container's filesystem is not looked into here."""
    (login.checkout / "runs" / "x" / "jobs").mkdir(parents=True)
    return snapshot.snapshot(login.checkout / "copied", login.checkout / "recipes" / "llava15_tiny.yaml", {})


def test_parts_become_shards_by_a_job_array(login: Login) -> None:
    for name in ("b", "a", "c"):
        (login.checkout / f"{name}.json").touch()
    array = {"SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_ID": "1", "SLURM_CPUS_PER_TASK": "8"}
    words = ("slurm/shards.sh", "out", "*.json", "--llava", "{}", "--images", "photos")
    login.run(*words, **array)
    told = "tools.shards make out --llava b.json --images photos --part 1/3 --whole --jobs 8 --quiet"
    assert login.started().endswith(told)
    login.run("slurm/shards.sh", "out", "--llava", "all.json", "--images", "photos", **array)
    told = "tools.shards make out --llava all.json --images photos --part 1/3 --jobs 8 --quiet"
    assert login.started().endswith(told)
    apart = login.run(*words, **{**array, "SLURM_ARRAY_TASK_MAX": "5"})
    assert apart.returncode == 2
    assert "all tasks from 0 on" in apart.stderr
    wrong = login.run(*words, **{**array, "SLURM_ARRAY_TASK_COUNT": "2"})
    assert wrong.returncode == 2
    assert "--array=0-2" in wrong.stderr


@pytest.mark.slow
def test_a_recipe_with_a_fault_queues_nothing(login: Login) -> None:
    login.shim("sbatch", "echo 1")
    done = login.run("slurm/chain.sh", "recipes/llava15_tiny.yaml", "stages.align.batch.micro_rows=0")
    assert done.returncode != 0
    assert "micro_rows" in done.stderr
    assert not login.calls.exists()
