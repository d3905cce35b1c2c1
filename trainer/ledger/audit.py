"""The data that a stage was trained on, proved from its ledger: every draw accounted for once, over all restarts.

    ledger lines that count --> trained on, left out, or of a batch that was skipped or rolled back
    quarantine.jsonl        --> unusable                         } together: 0, 1, 2, ... next - 1 of every slot,
    rollbacks.jsonl         --> which batches were rolled back   } each exactly once
    newest checkpoint       --> waiting in a pack, and the position of each slot

Owns the arithmetic. Needs neither the model nor a process group. Memory is a bit for each draw and each outcome that
occurs; time is linear in the draws.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from typing_extensions import TypedDict

from models.common.documents import check
from models.common.errors import InputError
from models.common.files import each_line
from trainer.checkpoint.format import newest
from trainer.checkpoint.reader import CheckpointReader
from trainer.checkpoint.resume import rollbacks
from trainer.ledger.blocks import NO_STEP, Block, IntArray, Runs
from trainer.ledger.books import Books
from trainer.ledger.draw_set import Address, Bits, DrawSet, SlotTable
from trainer.ledger.restarts import Counting, Restart, counting, read_restarts

_Flags = NDArray[np.bool_]
_DRAWS_AT_ONCE = 1 << 18


class _Consumed(TypedDict):
    batches: int
    steps: int


class _Stream(TypedDict):
    slots: dict[str, Any]


class _Counted(TypedDict):
    """What a checkpoint must say of the data behind it."""

    consumed: _Consumed
    stream: _Stream


class _Unusable(TypedDict):
    """A line of quarantine.jsonl."""

    slot: int
    n: int
    kind: str


class Fate(str, Enum):
    """The outcome of a draw. The values are names on disk, in `audit.json`."""

    LEARNT = "learnt"
    LEFT_OUT = "left_out"
    """Its row was not finite, and the step was computed without it."""
    SKIPPED = "skipped"
    """The guard skipped the step of its batch."""
    ROLLED_BACK = "rolled_back"
    """A rollback took its step back."""
    UNUSABLE = "passed_over"
    """The stream skipped it: damaged, too long, or excluded."""
    WAITING = "waiting"
    """In an open pack when the checkpoint was made."""


@dataclass(frozen=True)
class Records:
    """All records that a stage wrote."""

    restarts: Sequence[Restart] = ()
    rollbacks: Sequence[Mapping[str, Any]] = ()
    """The lines of rollbacks.jsonl."""
    quarantine: Iterable[Mapping[str, Any]] = ()
    """The lines of quarantine.jsonl."""


@dataclass(frozen=True)
class Account:
    """The outcome of every draw up to a checkpoint."""

    checkpoint: str
    num_batches: int
    num_steps: int
    num_restarts: int
    draws: Mapping[Fate, Sequence[Address]]
    lost: Sequence[Address]
    """Drawn, but in no record; none in a correct run."""
    repeated: Sequence[Address]
    """In the records more than once, or never drawn; none in a correct run."""
    missing_batches: Sequence[int]
    """Global batches that lack some rank's line; none in a correct run."""

    @property
    def is_clean(self) -> bool:
        """Nothing lost, nothing repeated, no batch without its lines."""
        return not (self.lost or self.repeated or self.missing_batches)


def audit(directory: Path) -> Account:
    """The account of a stage's directory up to its newest complete checkpoint; raises InputError without one."""
    found, _ = newest(directory / "checkpoints")
    if found is None:
        raise InputError(f"{directory}: no complete checkpoint, so there is no training to prove")
    records = Records(
        restarts=read_restarts(directory / "ledger"),
        rollbacks=rollbacks(directory),
        quarantine=each_line(directory / "quarantine.jsonl", _Unusable),
    )
    opened = CheckpointReader.open(found, verify=False)  # `newest` has
    state: Any = check(opened.state, _Counted, found / "state.json", "use another checkpoint")
    return settle(found.name, state, records)


def settle(checkpoint: str, state: Mapping[str, Any], records: Records) -> Account:
    """Compare the records of a stage with the draws that a checkpoint's state counts."""
    last = int(state["consumed"]["batches"])
    slots: Mapping[str, Any] = state["stream"]["slots"]
    books = Books(SlotTable.of({int(slot): entry["next"] for slot, entry in slots.items()}))
    counted = [each._replace(last=min(each.last, last)) for each in counting(records.restarts) if each.first < last]
    is_complete = _complete(counted, last)
    is_undone = _rolled_back(records.rollbacks, counted, last)
    for each in counted:
        for block in each.restart.blocks():
            _enter(books, block, each, is_complete, is_undone)
    waiting = np.array([(int(slot), n) for slot, entry in slots.items() for n in entry["open"]], dtype=np.int64)
    books.enter_draws(Fate.WAITING, *waiting.reshape(-1, 2).T)
    books.enter_unseen(Fate.UNUSABLE, _unusable(records.quarantine, books.table))
    return Account(
        checkpoint=checkpoint,
        num_batches=last,
        num_steps=int(state["consumed"]["steps"]),
        num_restarts=len(records.restarts),
        draws={fate: books.draws(fate) for fate in Fate},
        lost=books.lost(),
        repeated=books.repeated(),
        missing_batches=(np.flatnonzero(~is_complete[1:]) + 1).tolist(),
    )


def _complete(counted: Sequence[Counting], last: int) -> _Flags:
    """[last + 1]: whether the restart whose lines of a batch count has one of each of its ranks."""
    found, wanted = np.zeros(last + 1, dtype=np.int32), np.full(last + 1, -1, dtype=np.int32)
    for each in counted:
        wanted[each.first + 1 : each.last + 1] = each.restart.world_size
        for block in each.restart.blocks():
            batch = block.batch[(block.batch > each.first) & (block.batch <= each.last)]
            np.add.at(found, batch, 1)
    return found == wanted


def _rolled_back(entries: Sequence[Mapping[str, Any]], counted: Sequence[Counting], last: int) -> _Flags:
    """[last + 1]: batches whose updates a rollback took back, unless a later restart has computed them anew."""
    number, is_undone = np.zeros(last + 1, dtype=np.int64), np.zeros(last + 1, dtype=bool)
    for each in counted:
        number[each.first + 1 : each.last + 1] = each.restart.number
    for entry in entries:
        span = slice(entry["first_batch"], entry["last_batch"] + 1)
        is_undone[span] |= number[span] <= entry["attempt"]
    return is_undone


def _enter(books: Books, block: Block, counted: Counting, is_complete: _Flags, is_undone: _Flags) -> None:
    """Enter the draws of those lines of a block that count."""
    is_in = (block.batch > counted.first) & (block.batch <= counted.last)
    batch = np.where(is_in, block.batch, 0)
    counts = is_in & is_complete[batch]
    undone, skipped = is_undone[batch], block.step == NO_STEP
    outcomes = {Fate.ROLLED_BACK: undone, Fate.SKIPPED: ~undone & skipped, Fate.LEARNT: ~undone & ~skipped}
    if not counts.any():
        return
    if counts.all() and not block.num_left_out.any():
        for fate, lines in outcomes.items():
            if lines.all():
                books.enter(fate, block.runs)
                return
    slot, n = block.draws
    in_line = block.num_draws + block.num_left_out
    line = np.repeat(np.arange(block.num_lines), in_line)
    place = np.arange(len(line)) - np.repeat(np.cumsum(in_line) - in_line, in_line)
    is_left_out = place >= block.num_draws[line]
    chosen = {fate: lines[line] & ~is_left_out for fate, lines in outcomes.items()} | {Fate.LEFT_OUT: is_left_out}
    for fate, draws in chosen.items():
        taken = draws & counts[line]
        if taken.any():
            books.enter_draws(fate, slot[taken], n[taken])


def _unusable(quarantine: Iterable[Mapping[str, Any]], table: SlotTable) -> Bits:
    """Draws that the stream skipped; a restart that draws them again names them again."""
    found = Bits(table.size)
    for lines in _chunks(line for line in quarantine if line["kind"] != "not_finite"):
        columns = np.array([(line["slot"], line["n"]) for line in lines], dtype=np.int64)
        first, _, _ = table.split(Runs(columns[:, 0], columns[:, 1], np.ones(len(columns), dtype=np.int64)))
        found.mark_numbers(first)
    return found


def _chunks(lines: Iterator[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    while chunk := list(islice(lines, _DRAWS_AT_ONCE)):
        yield chunk


class NumberedSamples(Protocol):
    """An order that numbers its samples over all sources; `data_pipeline.sample_order.SampleOrder` is one."""

    @property
    def num_samples(self) -> int:
        """Samples of all sources."""

    def slot_length(self, slot: int) -> int:
        """Draws of one epoch in a slot."""

    def sample_numbers(self, slot: int, start: int, stop: int) -> IntArray:
        """The samples of draws [start, stop) of a slot."""


def repeats_within_epochs(account: Account, order: NumberedSamples) -> dict[int, tuple[int, int]]:
    """Epoch, from 0 -> (samples drawn, samples drawn more than once in it)."""
    drawn = [each for fate, each in account.draws.items() if fate is not Fate.WAITING and isinstance(each, DrawSet)]
    found: dict[int, tuple[int, int]] = {}
    table = drawn[0].table if drawn else SlotTable.of({})
    lengths = [max(1, order.slot_length(slot)) for slot in table.slots.tolist()]
    num_epochs = max(
        (-(-count // length) for count, length in zip(table.next.tolist(), lengths, strict=True)), default=0
    )
    for epoch in range(num_epochs):
        once, twice = Bits(order.num_samples), Bits(order.num_samples)
        for place, length in enumerate(lengths):
            for numbers in _numbers_of(drawn, table, place, range(epoch * length, (epoch + 1) * length), order):
                twice.mark_numbers(np.unique(once.mark_numbers(numbers)))
        if count := once.count():
            found[epoch] = (count, twice.count())
    return found


def _numbers_of(
    drawn: Sequence[DrawSet], table: SlotTable, place: int, draws: range, order: NumberedSamples
) -> Iterator[IntArray]:
    """The samples of a slot's draws, as far as they were drawn, a part at a time."""
    slot, base, stop = int(table.slots[place]), int(table.base[place]), min(draws.stop, int(table.next[place]))
    for low in range(draws.start, stop, _DRAWS_AT_ONCE):
        high = min(low + _DRAWS_AT_ONCE, stop)
        is_drawn = np.zeros(high - low, dtype=bool)
        for each in drawn:
            is_drawn |= each.bits.span(base + low, base + high)
        if is_drawn.any():
            yield order.sample_numbers(slot, low, high)[is_drawn]
