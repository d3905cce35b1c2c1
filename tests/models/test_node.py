"""The processes of a machine ask once in a start, and the next one asks where the first could not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from models.common.node import first_on_node
from models.common.source import directory_of

RANKS = {"WORLD_SIZE": "8", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def asks(what: str, environment: dict[str, str]) -> bool:
    with first_on_node(what, environment) as is_first:
        return is_first


def test_one_of_many_asks_and_one_alone_always() -> None:
    assert [asks("set", RANKS) for _ in range(8)] == [True] + [False] * 7
    assert asks("other set", RANKS)
    assert asks("set", {**RANKS, "MASTER_PORT": "29501"}), "another start"
    assert [asks("set", {}) for _ in range(2)] == [True, True]


def test_tasks_of_a_restarted_job_ask_again() -> None:
    job = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}
    assert [asks("set", job), asks("set", {**job, "SLURM_PROCID": "4"})] == [True, False]
    assert asks("set", {**job, "SLURM_RESTART_COUNT": "1"})


def test_where_the_first_could_not_the_next_one_asks() -> None:
    with pytest.raises(OSError, match="away"), first_on_node("set", RANKS):
        raise OSError("away")
    assert asks("set", RANKS)
    assert not asks("set", RANKS)


def test_one_rank_asks_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.safetensors").touch()
    asked: list[bool] = []

    def download(name: str, *, local_files_only: bool, **_: Any) -> str:
        asked.append(not local_files_only)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    for key, value in RANKS.items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("SLURM_PROCID", raising=False)
    assert {directory_of("owner/name") for _ in range(8)} == {tmp_path}
    assert asked == [True] + [False] * 7
