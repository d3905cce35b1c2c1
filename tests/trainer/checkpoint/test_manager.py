"""Saving beside training: what the loop waits for, and what is left after a fault, a second start or an early end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import trainer.checkpoint.manager as manager_module
from tests.support.checkpoints import whole_fragments
from tests.support.ranks import run_on_ranks
from trainer.checkpoint.format import Fragment, fault_of, name_of, newest
from trainer.checkpoint.manager import CheckpointManager
from trainer.checkpoint.reader import CheckpointReader
from trainer.distributed.context import DistributedContext

PATIENCE_S = 60.0
"""How long a test waits for a thread before it fails; it is never waited for in full."""


def manager(root: Path, *, keep: int = 10, token: str = "ours", **options: Any) -> CheckpointManager:
    return CheckpointManager(root, DistributedContext(), keep=keep, token=token, **options)


def weight_of(step: int) -> torch.Tensor:
    return torch.full((4,), float(step))


def begin(saver: CheckpointManager, step: int, weight: torch.Tensor | None = None) -> None:
    values = weight_of(step) if weight is None else weight
    saver.begin(step, fragments=[Fragment("w", (4,), 0, values, {})], inherited=[], state={"step": step})


def save(saver: CheckpointManager, step: int, spare: tuple[str, ...] = ()) -> str:
    begin(saver, step)
    return saver.finish(spare)


def until(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.001)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_training_goes_on_while_it_is_written(tmp_path: Path) -> None:
    """The checkpoint is of the moment of `begin`, whatever the loop does to the weights meanwhile."""
    go_on = threading.Event()
    saver = manager(tmp_path, before=[lambda: _wait(go_on)])
    weight = weight_of(1)
    begin(saver, 1, weight)
    assert (saver.is_busy, saver.is_written, saver.name) == (True, False, "step_000001")
    weight.fill_(-1.0)
    assert newest(tmp_path) == (None, [])
    go_on.set()
    until(lambda: saver.is_written)
    assert names(tmp_path) == [".step_000001.ours.tmp"]
    assert saver.finish() == ""
    saver.close()
    assert names(tmp_path) == ["step_000001"]
    reader = CheckpointReader.open(tmp_path / "step_000001")
    assert torch.equal(reader.weight("w"), weight_of(1))
    assert reader.state["step"] == 1
    assert (saver.is_busy, saver.name) == (False, "")
    assert saver.blocked_s > 0
    assert saver.longest_s > 0


def _wait(event: threading.Event) -> None:
    assert event.wait(PATIENCE_S)


def test_what_a_checkpoint_relies_on_comes_before_it_and_the_check_before_the_commit(tmp_path: Path) -> None:
    told: list[tuple[str, list[str]]] = []

    def note(what: str) -> Callable[[], None]:
        return lambda: told.append((what, names(tmp_path)))

    saver = manager(tmp_path, before=[note("ledger"), note("stream")], check=note("lock"))
    assert save(saver, 1) == ""
    saver.close()
    assert told == [("ledger", []), ("stream", []), ("lock", [".step_000001.ours.tmp"])]


@pytest.mark.parametrize("place", ["before", "write", "commit"])
def test_a_fault_keeps_the_older_ones_and_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        if is_full:
            raise OSError(28, "No space left on device")

    is_full = False
    saver = manager(tmp_path, before=[refuse] if place == "before" else [])
    assert save(saver, 1) == ""
    is_full = True
    with monkeypatch.context() as patch:
        if place == "write":
            patch.setattr(manager_module.RankShard, "write", refuse)
        if place == "commit":
            patch.setattr(manager_module, "commit", refuse)
        fault = save(saver, 2)
    assert fault.startswith("checkpoint step_000002 not written: ")
    assert "No space left on device" in fault
    assert not saver.is_busy
    is_full = False
    assert names(tmp_path) == ["step_000001"]
    assert save(saver, 3) == ""
    saver.close()
    assert names(tmp_path) == ["step_000001", "step_000003"]
    assert all(fault_of(tmp_path / name) is None for name in names(tmp_path))


def test_the_newest_and_the_spared_ones_stay(tmp_path: Path) -> None:
    saver = manager(tmp_path, keep=2)
    (tmp_path / ".step_000000.killed.tmp").mkdir()
    for step in (1, 2, 3, 4):
        assert save(saver, step, spare=("step_000001",)) == ""
    saver.close()
    assert names(tmp_path) == ["step_000001", "step_000003", "step_000004"]


def test_saves_behind_a_damaged_newest_one_stay(tmp_path: Path) -> None:
    """`keep` is 1 and step 8 is damaged: the run went on from step 4, and what it saves is what it has."""
    before = manager(tmp_path, keep=2)
    for step in (4, 8):
        assert save(before, step) == ""
    before.close()
    (tmp_path / "step_000008" / "state.json").write_text("{}")
    saver = manager(tmp_path, keep=1)
    for step in (5, 6):
        assert save(saver, step) == ""
        saver.close()
        found, skipped = newest(tmp_path)
        assert found == tmp_path / name_of(step)
        assert len(skipped) == 1
    assert names(tmp_path) == ["step_000006", "step_000008"]


def test_the_newest_commit_stays_whatever_lies_beside_it(tmp_path: Path) -> None:
    saver = manager(tmp_path, keep=1)
    assert save(saver, 9) == ""
    assert save(saver, 5) == ""
    saver.close()
    assert names(tmp_path) == ["step_000005", "step_000009"]


def test_two_starts_of_a_run_never_mix_their_files(tmp_path: Path) -> None:
    """A start that was cut off may still write when the next one saves the same step."""
    cut_off, restarted = manager(tmp_path, token="cut_off"), manager(tmp_path, token="restarted")
    begin(cut_off, 2, weight_of(-1))
    begin(restarted, 2)
    until(lambda: cut_off.is_written and restarted.is_written)
    assert names(tmp_path) == [".step_000002.cut_off.tmp", ".step_000002.restarted.tmp"]
    assert restarted.finish() == ""
    cut_off.close()
    restarted.close()
    assert names(tmp_path) == ["step_000002"]
    assert torch.equal(CheckpointReader.open(tmp_path / "step_000002").weight("w"), weight_of(2))


def test_close_waits_for_the_deleter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever takes the run over once it is closed must not have checkpoints removed under it."""
    go_on, ended = threading.Event(), threading.Event()

    def slow(*_: Any) -> None:
        _wait(go_on)
        ended.set()

    monkeypatch.setattr(manager_module, "remove_old", slow)
    saver = manager(tmp_path)
    assert save(saver, 1) == ""
    assert not ended.is_set()
    threading.Timer(0.05, go_on.set).start()
    saver.close()
    assert ended.is_set()


def test_close_after_an_error_waits_for_the_writer_and_commits_nothing(tmp_path: Path) -> None:
    go_on = threading.Event()
    saver = manager(tmp_path, before=[lambda: _wait(go_on)])
    begin(saver, 1)
    threading.Timer(0.05, go_on.set).start()
    saver.close()  # the loop broke off between begin and finish
    assert not saver.is_busy
    assert newest(tmp_path) == (None, [])
    assert not any(thread.name.startswith("checkpoint") for thread in threading.enumerate())
    saver.close()
    assert save(manager(tmp_path, token="next"), 1) == ""


def test_a_new_manager_does_nothing(tmp_path: Path) -> None:
    saver = manager(tmp_path / "never")
    assert not saver.is_busy
    assert saver.is_written
    saver.close()
    assert not any(tmp_path.iterdir())


def save_with_a_fault(ranks: DistributedContext, root: Path) -> tuple[str, str]:
    """Both ranks save twice; the second time rank 1's disk is full."""
    from trainer.engine.process_group import leave_distributed, start_distributed

    start_distributed(ranks, PATIENCE_S)
    is_full: list[bool] = []

    def before() -> None:
        if is_full and ranks.rank == 1:
            raise OSError(28, "No space left on device")

    saver = CheckpointManager(root, ranks, keep=10, token="ours", before=[before])
    faults = []
    for step in (1, 2):
        half = Fragment("w", (4,), 2 * ranks.rank, weight_of(step)[:2], {})
        whole = whole_fragments({"v": torch.ones(3)}) if ranks.is_first else []
        divided = Fragment("z", (3,), 2 * ranks.rank, torch.arange(3.0)[2 * ranks.rank :][:2], {})
        saver.begin(step, fragments=[half], inherited=[*whole, divided], state={})
        faults.append(saver.finish())
        is_full.append(True)
    saver.close()
    leave_distributed()
    return faults[0], faults[1]


@pytest.mark.slow
def test_ranks_commit_together_or_not_at_all(tmp_path: Path) -> None:
    first, second = run_on_ranks(2, save_with_a_fault, tmp_path)
    assert first == second
    assert first[0] == ""
    assert first[1] == f"checkpoint {name_of(2)} not written: rank 1: [Errno 28] No space left on device"
    assert names(tmp_path) == ["step_000001"]
    reader = CheckpointReader.open(tmp_path / "step_000001")
    assert torch.equal(reader.weight("w"), weight_of(1))
    assert torch.equal(reader.weight("v"), torch.ones(3))
    assert torch.equal(reader.weight("z"), torch.arange(3.0))
    assert [path.name for path in sorted(reader.directory.glob("*.safetensors"))] == [
        "given.safetensors",
        "given_00001.safetensors",
        "rank_00000_of_00002.safetensors",
        "rank_00001_of_00002.safetensors",
    ]
