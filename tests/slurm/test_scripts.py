"""The job scripts parse, pass shellcheck, and hand their words to the training command."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.paths import REPOSITORY

SCRIPTS = sorted((REPOSITORY / "slurm").glob("*.sh"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_it_parses(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    if shutil.which("shellcheck") is not None:
        subprocess.run(["shellcheck", str(script)], check=True)


@pytest.mark.parametrize(("script", "stage"), [("stage1.sh", "align"), ("stage2.sh", "lora")])
@pytest.mark.parametrize("words", [[], ["recipes/x.yaml", "run=runs/x y", "seed=3"]])
def test_words_reach_the_training_command(tmp_path: Path, script: str, stage: str, words: list[str]) -> None:
    """With stand-ins for Slurm's two commands: what would be started, and where its ranks would meet."""
    shims = {"scontrol": 'printf "node7\\nnode8\\n"', "srun": 'printf "%s\\n" "$MASTER_ADDR" "$MASTER_PORT" "$@"'}
    for name, body in shims.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_JOB_ID": "41",
        "SIGHTLINE_VENV": str(tmp_path / "none"),
    }
    command = ["bash", f"slurm/{script}", *words]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True)
    address, port, *started = done.stdout.splitlines()
    recipe, *overrides = words or ["recipes/llava15_tiny.yaml"]
    assert (address, port) == ("node7", "20041")
    assert started == ["--kill-on-bad-exit=1", "python", "-m", "trainer.main", recipe, "--stage", stage, *overrides]
