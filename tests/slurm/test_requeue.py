"""Which nodes a job is kept off: those that failed first, by what their ranks recorded. Slurm's answers are made up."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from tests.support.paths import REPOSITORY

SCRIPT = """\
source slurm/exit_codes.sh
source slurm/requeue.sh
scontrol() { printf 'node1\\nnode2\\nnode3\\n'; }
sinfo() { cat "$folder/state-$3"; }
wait_s() { echo 100; }
job=$1 folder=$1 restart=0 SLURM_JOB_NODELIST='node[1-3]' SLURM_JOB_NUM_NODES=3
bad_nodes
"""

Ends = dict[str, list[tuple[int, float]] | None]


@pytest.mark.parametrize(
    ("ends", "down", "bad"),
    [
        pytest.param({"node1": [(76, 30)], "node2": [(1, 40)], "node3": [(76, 30)]}, "", "node2", id="one fails"),
        pytest.param(
            {"node1": [(134, 20)], "node2": [(139, 40)], "node3": [(134, 19)]}, "", "node2", id="others die of it"
        ),
        pytest.param({"node1": [(1, 40)], "node2": [(1, 39)], "node3": [(1, 41)]}, "", "", id="all at once: the run"),
        pytest.param({"node1": [(76, 20)], "node2": None, "node3": [(76, 20)]}, "", "node2", id="power cut"),
        pytest.param({"node1": [(134, 20)], "node2": None, "node3": [(1, 20)]}, "", "node2", id="others' own codes"),
        pytest.param({"node1": None, "node2": [(1, 130)], "node3": None}, "", "node2", id="srun killed deaf ones"),
        pytest.param(
            {"node1": [(1, 40)], "node2": [(76, 20)], "node3": [(76, 20)]}, "node3", "node3", id="Slurm knows"
        ),
        pytest.param({"node1": [(75, 9)], "node2": [(75, 9)], "node3": [(75, 9)]}, "", "", id="stopped"),
        pytest.param({"node1": None, "node2": None, "node3": None}, "", "", id="nobody recorded"),
        pytest.param(
            {"node1": [(76, 9), (76, 9)], "node2": [(76, 9), (137, 40)], "node3": [(76, 9)]}, "", "node2", id="a rank"
        ),
    ],
)
def test_nobody_is_blamed_for_dying_of_anothers_death(tmp_path: Path, ends: Ends, down: str, bad: str) -> None:
    """`ends`: by node the (code, seconds ago) of its ranks; None: it recorded nothing."""
    folder = tmp_path / "ended" / "0"
    folder.mkdir(parents=True)
    now_s = time.time()
    for node, ranks in ends.items():
        (tmp_path / f"state-{node}").write_text("down*\n" if node == down else "allocated\n")
        if ranks is not None:
            lines = [f"{code} {now_s - ago_s:.9f} 0" for code, ago_s in ranks]
            (folder / node).write_text("\n".join(lines) + "\n")
    done = subprocess.run(
        ["bash", "-Eeuo", "pipefail", "-c", SCRIPT, "test", str(tmp_path)],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == bad.split(), done.stderr


TASK = r"""
printf '%s\n' '--- job 1, restart 0, rank 0' 'an older start: ProcessGroupNCCL watchdog' > "$log"
printf '%s\n' '--- job 1, restart 1, rank 0' "$said" >> "$log"
exec bash slurm-copy/slurm/launch.sh task bash -c "kill -$signal \$\$"
"""


@pytest.mark.parametrize(
    ("said", "signal", "code"),
    [
        (
            "[PG ID 0 PG GUID 0 Rank 0] Process group watchdog thread terminated with exception: NCCL error: remote "
            "process exited or there was a network error, ncclRemoteError (ProcessGroupNCCL watchdog)",
            "ABRT",
            76,
        ),
        ("terminate called after throwing an instance of 'c10::DistBackendError'", "ABRT", 76),
        ("Process group watchdog thread terminated with exception: CUDA error: uncorrectable ECC error", "ABRT", 134),
        ("free(): invalid pointer", "ABRT", 134),
        ("terminate called after throwing an instance of 'c10::DistBackendError'", "SEGV", 139),
    ],
)
def test_what_nccls_watch_ended_was_another_ranks_death(tmp_path: Path, said: str, signal: str, code: int) -> None:
    job, stage = tmp_path / "slurm-copy", tmp_path / "stage"
    (job / "slurm").mkdir(parents=True)
    for name in ("launch.sh", "exit_codes.sh"):
        (job / "slurm" / name).write_text((REPOSITORY / "slurm" / name).read_text())
    (job / "ended" / "1").mkdir(parents=True)
    (stage / "logs").mkdir(parents=True)
    (stage / "ranks").mkdir()
    (job / "starts").touch()
    environment = {
        "PATH": "/usr/bin:/bin", "log": str(stage / "logs" / "rank_00000.log"), "said": said, "signal": signal,
        "SLURM_RESTART_COUNT": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURMD_NODENAME": "node7",
        "SLURM_JOB_ID": "1", "SIGHTLINE_STAGE": str(stage), "SIGHTLINE_STARTS": str(job / "starts"),
        "SIGHTLINE_BUILDS": str(tmp_path / "builds"),
    }  # fmt: skip
    done = subprocess.run(
        ["bash", "-c", TASK], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    (line,) = (job / "ended" / "1" / "node7").read_text().splitlines()
    recorded, ended_s, rank = line.split()
    assert (int(recorded), int(rank)) == (code, 0)
    assert abs(float(ended_s) - time.time()) < 600
    notice = stage / "ranks" / "failed.json"
    assert notice.exists() == (code > 128), "the others' watch looks for it"
