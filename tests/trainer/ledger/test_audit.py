"""Every draw up to a checkpoint is accounted for once: synthetic ledgers, sound ones and each way to be unsound."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

import trainer.ledger.draw_set as draw_set
from models.common.errors import InputError
from tests.support.checkpoints import write_checkpoint
from trainer.ledger.audit import Account, Fate, Records, audit, repeats_within_epochs, settle
from trainer.ledger.blocks import block_of_lines, make_block
from trainer.ledger.restarts import Restart

NUM_SLOTS = 4


def line(batch: int, slots: Iterable[int], *, step: int | None = -1, left_out: Iterable[int] = ()) -> dict[str, Any]:
    """Global batch `batch`, in which every slot takes draw `batch` - 1; step -1 is the batch's own number."""
    gone = set(left_out)
    return {
        "batch": batch,
        "step": batch if step == -1 else step,
        "draws": [[slot, batch - 1] for slot in slots if slot not in gone],
        "left_out": [[slot, batch - 1] for slot in slots if slot in gone],
    }


Lines = dict[int, list[dict[str, Any]]]


@dataclass
class Written:
    """What one start wrote: global batch -> a line of each rank."""

    number: int
    resumed_at: int
    world_size: int
    lines: Lines

    def read(self) -> Restart:
        """As it is read: each rank's lines are a block."""
        ranks: dict[int, list[dict[str, Any]]] = {}
        for lines in self.lines.values():
            for rank, each in enumerate(lines):
                ranks.setdefault(rank, []).append(each)
        blocks = [block_of_lines(lines) for lines in ranks.values()]
        return Restart(self.number, self.resumed_at, self.world_size, lambda: iter(blocks))


def restart(number: int, resumed_at: int, last: int, world_size: int = 2) -> Written:
    """One that computed the batches up to `last`, the slots dealt to so many ranks."""
    each = NUM_SLOTS // world_size
    shares = [range(rank * each, (rank + 1) * each) for rank in range(world_size)]
    batches = range(resumed_at + 1, last + 1)
    return Written(number, resumed_at, world_size, {b: [line(b, share) for share in shares] for b in batches})


def state(batches: int, *, drawn: int | None = None, waiting: dict[int, list[int]] | None = None) -> dict[str, Any]:
    """A checkpoint behind so many batches, every slot having drawn once for each."""
    slots = {
        str(slot): {"next": batches if drawn is None else drawn, "open": (waiting or {}).get(slot, [])}
        for slot in range(NUM_SLOTS)
    }
    return {"consumed": {"batches": batches, "steps": batches}, "stream": {"slots": slots}}


def account(
    batches: int, *restarts: Written, checkpoint: dict[str, Any] | None = None, **records: list[dict[str, Any]]
) -> Account:
    return settle("step", checkpoint or state(batches), Records([each.read() for each in restarts], **records))


def counts(found: Account) -> dict[Fate, int]:
    return {fate: len(addresses) for fate, addresses in found.draws.items() if addresses}


def test_a_run_without_trouble_is_clean() -> None:
    found = account(3, restart(1, 0, 3))
    assert found.is_clean
    assert counts(found) == {Fate.LEARNT: 12}
    assert (found.num_batches, found.num_steps, found.num_restarts) == (3, 3, 1)


def test_what_lies_beyond_the_checkpoint_does_not_count() -> None:
    assert counts(account(2, restart(1, 0, 5))) == {Fate.LEARNT: 8}


@pytest.mark.parametrize("world_sizes", [(2, 1), (1, 4), (4, 2)])
def test_a_restart_on_another_number_of_ranks_goes_on_with_the_same_draws(world_sizes: tuple[int, int]) -> None:
    """The first was killed behind batch 5, its last checkpoint behind batch 3."""
    before, after = world_sizes
    found = account(7, restart(1, 0, 5, before), restart(2, 3, 7, after))
    assert found.is_clean
    assert (counts(found), found.num_restarts) == ({Fate.LEARNT: 28}, 2)


def test_a_draw_that_no_line_has_is_lost() -> None:
    whole = restart(1, 0, 3)
    whole.lines[2][1]["draws"].remove([3, 1])
    found = account(3, whole)
    assert (found.lost, found.repeated, found.is_clean) == ([(3, 1)], [], False)


def test_a_draw_that_two_lines_have_is_repeated() -> None:
    whole = restart(1, 0, 3)
    whole.lines[3][0]["draws"].append([0, 0])
    found = account(3, whole)
    assert (found.lost, found.repeated, found.is_clean) == ([], [(0, 0)], False)


def test_a_draw_that_the_checkpoint_does_not_know_counts_as_repeated() -> None:
    whole = restart(1, 0, 3)
    whole.lines[3][0]["draws"].append([0, 9])
    assert account(3, whole).repeated == [(0, 9)]


@pytest.mark.parametrize("num_lines", [0, 1])
def test_a_batch_that_lacks_a_line_of_a_rank_is_missing_and_its_draws_are_lost(num_lines: int) -> None:
    whole = restart(1, 0, 3)
    whole.lines[2] = whole.lines[2][:num_lines]
    found = account(3, whole)
    assert found.missing_batches == [2]
    assert found.lost == [(slot, 1) for slot in range(NUM_SLOTS)]


def test_a_batch_that_no_restart_knows_is_missing() -> None:
    whole = restart(1, 0, 3)
    del whole.lines[2]
    assert account(3, whole).missing_batches == [2]


def test_rows_left_out_and_steps_skipped_are_told_apart() -> None:
    whole = restart(1, 0, 3)
    whole.lines[1] = [line(1, [0, 1]), line(1, [2, 3], left_out=[2])]
    whole.lines[2] = [line(2, [0, 1], step=None), line(2, [2, 3], step=None)]
    found = account(3, whole)
    assert found.is_clean
    assert counts(found) == {Fate.LEARNT: 7, Fate.LEFT_OUT: 1, Fate.SKIPPED: 4}
    assert found.draws[Fate.LEFT_OUT] == [(2, 0)]


def test_batches_that_were_rolled_back_are_not_learnt() -> None:
    found = account(5, restart(1, 0, 5), rollbacks=[{"first_batch": 3, "last_batch": 4, "attempt": 1}])
    assert found.is_clean
    assert counts(found) == {Fate.LEARNT: 12, Fate.ROLLED_BACK: 8}


def test_a_rollback_that_a_later_restart_superseded_takes_nothing_back() -> None:
    """The run was killed after it, and the restart went on from before the batches: they were computed anew."""
    rollback = {"first_batch": 3, "last_batch": 4, "attempt": 1}
    found = account(5, restart(1, 0, 5), restart(2, 2, 5), rollbacks=[rollback])
    assert counts(found) == {Fate.LEARNT: 20}


def quarantined(slot: int, n: int, kind: str = "bad") -> dict[str, Any]:
    return {"slot": slot, "n": n, "kind": kind, "shard": "a.tar", "key": "x", "reason": "broken"}


def test_unusable_draws_are_accounted_for_by_the_quarantine() -> None:
    """Slot 0 skipped its draws 1 and 2, slot 1 one that a restart drew again; what is beyond the state is not drawn."""
    whole = restart(1, 0, 3)
    whole.lines[2][0]["draws"] = [[1, 1]]
    whole.lines[3][0]["draws"] = [[1, 2]]
    lines = [quarantined(0, 1), quarantined(0, 1), quarantined(0, 2, "too_long"), quarantined(1, 3)]
    found = account(3, whole, quarantine=lines)
    assert found.is_clean
    assert found.draws[Fate.UNUSABLE] == [(0, 1), (0, 2)]


def test_a_sample_in_quarantine_for_its_numbers_is_in_the_ledger_and_not_unusable() -> None:
    found = account(2, restart(1, 0, 2), quarantine=[quarantined(0, 0, "not_finite")])
    assert (found.is_clean, counts(found)) == (True, {Fate.LEARNT: 8})


def test_draws_that_wait_in_a_pack_are_accounted_for() -> None:
    waiting = {slot: [2] for slot in range(NUM_SLOTS)}
    found = account(2, restart(1, 0, 2), checkpoint=state(2, drawn=3, waiting=waiting))
    assert found.is_clean
    assert counts(found) == {Fate.LEARNT: 8, Fate.WAITING: 4}


def test_repeats_are_told_by_name_within_an_epoch() -> None:
    """Draws 0 and 1 of a slot are its first epoch. One sample comes twice in it, another once in each epoch."""
    numbers = np.arange(4 * NUM_SLOTS).reshape(NUM_SLOTS, 4)
    numbers[0, 1] = numbers[1, 0]
    numbers[2, 2] = numbers[2, 0]

    class Order:
        num_samples = 4 * NUM_SLOTS

        def slot_length(self, slot: int) -> int:
            return 2

        def sample_numbers(self, slot: int, start: int, stop: int) -> Any:
            return numbers[slot, start:stop]

    assert repeats_within_epochs(account(4, restart(1, 0, 4)), Order()) == {0: (7, 1), 1: (8, 0)}


def test_files_as_older_runs_wrote_them_are_read(tmp_path: Path) -> None:
    """Names and keys as they have always been on disk."""
    write_checkpoint(tmp_path / "checkpoints", 2, fragments=[], inherited={}, state=state(2, drawn=3))
    folder = tmp_path / "ledger" / "attempt_0001"
    folder.mkdir(parents=True)
    (folder / "attempt.json").write_text('{"resumed_at": 0, "world_size": 1, "host": "a", "started": "2026-01-01"}')
    lines = [line(batch, range(NUM_SLOTS)) | {"loss": 1.0} for batch in (1, 2)]
    (folder / "rank_00000.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in lines))
    skipped = [quarantined(slot, 2) for slot in range(NUM_SLOTS)]
    (tmp_path / "quarantine.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in skipped))
    found = audit(tmp_path)
    assert found.is_clean
    assert (found.checkpoint, counts(found)) == ("step_000002", {Fate.LEARNT: 8, Fate.UNUSABLE: 4})
    with pytest.raises(InputError, match="no complete checkpoint"):
        audit(tmp_path / "ledger")


@pytest.mark.parametrize("seed", range(8))
def test_any_ledger_is_settled_as_one_draw_after_the_other_would_be(seed: int) -> None:
    """Restarts, skipped and rolled back steps, rows left out, draws lost and doubled, beside sets of addresses."""
    random = Random(seed)
    starts = [restart(number, resumed_at, last) for number, resumed_at, last in ((1, 0, 9), (2, 5, 8), (3, 7, 12))]
    for start in starts:
        for number, lines in start.lines.items():
            step = None if random.random() < 0.2 else number
            for each in lines:
                each["step"] = step
                if random.random() < 0.3:
                    each["left_out"].append(each["draws"].pop(random.randrange(len(each["draws"]))))
                if random.random() < 0.1:
                    each["draws"].append([random.randrange(NUM_SLOTS), random.randrange(14)])
                if random.random() < 0.1 and each["draws"]:
                    each["draws"].pop()
    rollback = {"first_batch": 3, "last_batch": 6, "attempt": 2}
    quarantine = [quarantined(random.randrange(NUM_SLOTS), random.randrange(12)) for _ in range(9)]
    found = account(11, *starts, rollbacks=[rollback], quarantine=quarantine)

    of: dict[str, list[tuple[int, int]]] = {fate: [] for fate in Fate}
    for batch in range(1, 12):
        start = starts[0] if batch <= 5 else starts[1] if batch <= 7 else starts[2]
        for each in start.lines[batch]:
            undone = 3 <= batch <= 6 and start.number <= 2
            fate = Fate.ROLLED_BACK if undone else Fate.SKIPPED if each["step"] is None else Fate.LEARNT
            of[fate] += [(slot, n) for slot, n in each["draws"]]
            of[Fate.LEFT_OUT] += [(slot, n) for slot, n in each["left_out"]]
    used = {address for each in of.values() for address in each}
    of[Fate.UNUSABLE] = sorted({(q["slot"], q["n"]) for q in quarantine if q["n"] < 11} - used)
    entered = [address for each in of.values() for address in each]
    drawn = {(slot, n) for slot in range(NUM_SLOTS) for n in range(11)}
    assert list(found.lost) == sorted(drawn - set(entered))
    assert set(found.repeated) == {each for each in entered if entered.count(each) > 1 or each not in drawn}
    for fate in Fate:
        assert sorted(set(found.draws[fate])) == sorted(set(of[fate])), fate


def test_a_million_draws_take_a_bit_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """256 slots of 4,096 draws, on 2 ranks; what the audit allocates is a few bits for each."""
    num_slots, num_batches = 256, 4096
    blocks = []
    for rank in range(2):
        slots = np.arange(rank * num_slots // 2, (rank + 1) * num_slots // 2)
        for low in range(0, num_batches, 512):
            batch = np.arange(low + 1, low + 513)
            counts = [np.full(512, len(slots)), np.zeros(512, np.int64)]
            blocks.append(
                make_block([batch, batch, *counts], np.tile(slots, 512), np.repeat(batch - 1, len(slots)), [])
            )
    assert sum(len(block.to_bytes()) for block in blocks) < 0.02 * num_slots * num_batches
    checkpoint = {
        "consumed": {"batches": num_batches, "steps": num_batches},
        "stream": {"slots": {str(slot): {"next": num_batches, "open": []} for slot in range(num_slots)}},
    }
    monkeypatch.setattr(draw_set, "_MAX_NUMBERS", 1 << 14)
    tracemalloc.start()
    found = settle("step", checkpoint, Records([Restart(1, 0, 2, lambda: iter(blocks))]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.is_clean
    assert len(found.draws[Fate.LEARNT]) == num_slots * num_batches
    assert peak < 2 * num_slots * num_batches, "bits, and one block at a time"
