"""What a checkpoint holds goes out and comes back, and a state of a later version is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from models.common.errors import InputError
from tests.support.fakes import make_run, row
from trainer.checkpoint.layout import read_layout
from trainer.checkpoint.reader import CheckpointReader
from trainer.checkpoint.resume import note_rollback, rollbacks_to
from trainer.distributed.context import DistributedContext
from trainer.schedule import Consumed
from trainer.state import STATE_VERSION, TrainState, num_micro_batches


def used(tmp_path: Path) -> TrainState:
    state = make_run(tmp_path, [[row(0)], [row(1)], [row(2)]]).state
    state.stream.next_rows()
    state.consumed = Consumed(steps=3, samples=6, tokens=20, draws=7, batches=4)
    state.best.offer(1.5, 2, lower_is_better=True)
    state.guard.decide(2.0, 1.0, can_go_back=False)
    return state


def reader_of(values: dict[str, Any], name: str = "step_000003") -> Any:
    return CheckpointReader(Path("checkpoints") / name, values, read_layout(Path(), {"files": {}}))


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr("trainer.state.merge_states", lambda states: states[0])
    return used(tmp_path).state_dict(DistributedContext(), num_updates=3)


def test_a_state_comes_back_as_it_was(tmp_path: Path, saved: dict[str, Any]) -> None:
    fresh = make_run(tmp_path / "fresh", [[row(0)], [row(1)], [row(2)]]).state
    fresh.load(reader_of(saved), tmp_path)
    assert fresh.state_dict(DistributedContext(), num_updates=3) == saved
    assert saved["state_version"] == STATE_VERSION


def test_a_state_without_a_version_is_the_first_ones(tmp_path: Path, saved: dict[str, Any]) -> None:
    del saved["state_version"]
    state = make_run(tmp_path / "fresh", []).state
    state.load(reader_of(saved), tmp_path)
    assert state.consumed.steps == 3


def test_a_state_of_another_version_is_refused(tmp_path: Path, saved: dict[str, Any]) -> None:
    saved["state_version"] = STATE_VERSION + 1
    with pytest.raises(InputError, match=r"step_000003: its state has version 2, this program reads 1"):
        make_run(tmp_path / "fresh", []).state.load(reader_of(saved), tmp_path)


def test_the_data_go_on_where_the_last_rollback_to_the_checkpoint_did(tmp_path: Path, saved: dict[str, Any]) -> None:
    note_rollback(tmp_path, rolled_back(saved, 9))
    note_rollback(tmp_path, {**rolled_back(saved, 11), "checkpoint": "step_000001"})
    state = make_run(tmp_path / "fresh", []).state
    state.load(reader_of(saved), tmp_path)
    assert (state.consumed.batches, state.consumed.steps) == (9, 3)
    stream_now: Any = state.stream
    assert stream_now.position == 3


def rolled_back(saved: dict[str, Any], batches: int, **more: Any) -> dict[str, Any]:
    consumed = {**saved["consumed"], "batches": batches, "draws": 12}
    batch_range = {"first_batch": 4, "last_batch": batches, "attempt": 1}
    stream = {**saved["stream"], "position": 3}
    return {"checkpoint": "step_000003", "consumed": consumed, "stream": stream, **batch_range, **more}


def test_a_rollback_holds_for_the_very_checkpoint_it_was_written_for(tmp_path: Path, saved: dict[str, Any]) -> None:
    """Checkpoints that were removed leave their records behind; the run that is trained anew has none of them."""
    for number, told in enumerate([{"checkpoint_id": "removed"}, {}, {"checkpoint_id": "present"}]):
        note_rollback(tmp_path, rolled_back(saved, 9 + number, **told))
    for found, batches in (("anew", 4), ("present", 11), ("removed", 9), (None, 10)):
        state = make_run(tmp_path / f"fresh_{found}", []).state
        state.load(reader_of(saved if found is None else {**saved, "id": found}), tmp_path)
        assert state.consumed.batches == batches, found
        assert state.num_rollbacks == (0 if found == "anew" else 1), found
    assert len(rollbacks_to(tmp_path, reader_of({**saved, "id": "present"}))) == 1


def test_rollbacks_before_a_checkpoint_count_and_those_of_an_earlier_run_do_not(
    tmp_path: Path, saved: dict[str, Any]
) -> None:
    note_rollback(tmp_path, rolled_back(saved, 9, checkpoint_id="ours"))
    state = make_run(tmp_path / "fresh", []).state
    state.load(reader_of({**saved, "id": "ours", "num_rollbacks": 2}), tmp_path)
    assert state.num_rollbacks == 3
    del saved["num_rollbacks"]  # an older version did not say: every record counts, as it did there
    state.load(reader_of({**saved, "id": "another"}), tmp_path)
    assert state.num_rollbacks == 1


@pytest.mark.parametrize(("rows", "micro", "ranks", "number"), [(4, 1, 2, 2), (5, 2, 2, 2), (2, 8, 1, 1), (7, 1, 2, 4)])
def test_every_rank_computes_as_many_micro_batches(
    tmp_path: Path, rows: int, micro: int, ranks: int, number: int
) -> None:
    run = make_run(tmp_path, [], recipe={"batch": {"global_rows": rows, "micro_rows": micro}})
    assert num_micro_batches(run.context.config, ranks) == number


def test_the_lock_is_given_back_last(tmp_path: Path) -> None:
    run, order = make_run(tmp_path, []), []
    services: Any = run.services

    class Told:
        def __init__(self, name: str) -> None:
            self.name = name

        def close(self) -> None:
            order.append(self.name)

        release = close

    for name in ("engine", "checkpoints", "ledger", "watchdog", "events", "lock"):
        object.__setattr__(services, name, Told(name))
    run.close()
    assert order[-2:] == ["checkpoints", "lock"], "the thread that deletes old checkpoints has ended before"
    assert sorted(order) == ["checkpoints", "engine", "events", "ledger", "lock", "watchdog"]
    order.clear()
    run.abandon()
    assert order == ["checkpoints", "lock"]
