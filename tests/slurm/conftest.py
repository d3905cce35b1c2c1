"""A cluster for the whole session, and a checkout whose owner has edited slurm/site.env and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.mini_slurm import MiniSlurm, why_no_slurm
from tests.support.paths import REPOSITORY
from tests.support.patience import GUARD_S

FOLDERS = ("trainer", "models", "data_pipeline", "eval", "tools", "ds_configs", "slurm", "recipes")

SITE = """\
export SBATCH_PARTITION=main SBATCH_GPUS_PER_NODE=1
SIGHTLINE_VENV={venv}
SIGHTLINE_INTERFACE=eth0
export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
# Both ways of starting ranks are tried: this one for the stage that comes second.
case ${{SLURM_JOB_NAME:-}} in *lora) SIGHTLINE_LAUNCHER=deepspeed ;; esac
"""
VOLUME_MB = 64


@dataclass(frozen=True)
class Checkout:
    """A user's copy of the project on the cluster."""

    folder: Path
    cluster: MiniSlurm

    def type(self, line: str) -> str:
        """What a line typed on the login node prints."""
        done = subprocess.run(
            ["bash", "-c", f"source slurm/site.env && {line}"],
            cwd=self.folder, env=self.cluster.environment, capture_output=True, text=True, timeout=GUARD_S, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def submit(self, words: str) -> str:
        """The number of the job that `sbatch WORDS` makes."""
        return self.type(f"sbatch --parsable {words}").strip()

    def log(self, job: str) -> str:
        """What the job itself has said so far."""
        (file,) = (self.folder / "slurm" / "logs").glob(f"*-{job}.out")
        # Several tasks write it at once, and a progress bar's characters have several bytes.
        return file.read_text(encoding="utf-8", errors="replace")


def copy_checkout(folder: Path) -> Path:
    """What a clone would hold, and the site file."""
    for name in FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__", "site.env", "*.out", "job-*")
        shutil.copytree(REPOSITORY / name, folder / name, ignore=ignored)
    shutil.copyfile(REPOSITORY / "sightline_packages.py", folder / "sightline_packages.py")
    (folder / "slurm" / "site.env").write_text(SITE.format(venv=Path(sys.executable).parents[1]))
    return folder


@pytest.fixture(scope="session")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A small file system that can be filled; mounted before the nodes start, so that all of them have it."""
    _need_slurm()
    folder = tmp_path_factory.mktemp("volume")
    command = ["mount", "-t", "tmpfs", "-o", f"size={VOLUME_MB}m", "sightline-slurm", str(folder)]
    subprocess.run(command, check=True)
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="session")
def cluster(volume: Path) -> Iterator[MiniSlurm]:
    """Two nodes for a job of two ranks, and two to go on with."""
    with MiniSlurm(4) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def checkout(cluster: MiniSlurm, quickstart_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """It holds what the quickstart's recipe trains on, where that recipe looks for it."""
    folder = copy_checkout(tmp_path_factory.mktemp("checkout"))
    runs = folder / "runs" / "quickstart"
    runs.mkdir(parents=True)
    for name in ("world", "clip", "language", "shards"):
        (runs / name).symlink_to(quickstart_world / name)
    return Checkout(folder, cluster)


def _need_slurm() -> None:
    why = why_no_slurm()
    if why and os.environ.get("SIGHTLINE_REQUIRE_SLURM"):
        pytest.fail(f"Slurm was to be here: {why}")
    if why:
        pytest.skip(why)
