"""The rows that one rank takes from the global stream, step by step, and its position.

Owns drawing, the replacement and count of samples that are skipped, and the state of its slots. Does not own order
(`sample_order`), encoding (`encode`), tensors (`batch`) nor what a state of all ranks is (`stream_state`).

A rank owns a run of slots. A slot is a row of the global batch with its own run of samples: it draws, packs and runs
out on its own. The state is, per slot, the next draw and the draws that wait in an open pack, so the states of all
ranks merge by slot and load on any other number of ranks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.config import GroupPacking, PadPacking, RowPacking
from data_pipeline.fetch import Fetcher
from data_pipeline.packing import Packer
from data_pipeline.read_ahead import ReadAhead
from data_pipeline.sample import BadSample, Encoded, Row, SampleRef
from data_pipeline.sample_order import SampleOrder
from data_pipeline.stream_state import STATE_VERSION, check_state
from models.common.errors import InputError
from models.common.files import LineFile

MIN_DRAWS_TO_JUDGE = 200
"""The share of bad samples is taken over at least this many draws: a few at the start do not stop the run.
"""

MAX_SKIPPED_IN_A_ROW = 1000
"""An endless slot that skips this many samples in a row, and at least an epoch of them, stops the run."""


@dataclass(slots=True)
class _Slot:
    """The position of one slot."""

    packer: Packer
    end: int | None
    """Draws until it runs out; None: never."""
    next: int = 0
    num_bad: int = 0
    num_too_long: int = 0
    num_shrunk: int = 0
    num_skipped_in_a_row: int = 0
    ahead: deque[SampleRef] = field(default_factory=deque)
    """The next draws, resolved, which workers are already encoding; the first of them is draw `next`."""


@dataclass(frozen=True)
class Limits:
    """How a stream handles samples that it cannot use."""

    bad_share: float = 0.05
    too_long_is_error: bool = False
    quarantine: Path | None = field(default=None)
    """A JSON Lines file; one line per sample that was skipped: slot, n, shard, key, kind, reason."""


class RowStream:
    """Rows of the slots in `slots`. Nothing is opened and no process starts before the first rows are asked for.

    Args:
        order: which sample each draw is. A state of another order is refused.
        fetcher: encodes samples, in worker processes or inline; the stream closes it.
        slots: this rank's run of the order's slots.
        epochs: how often every sample is seen; None: without end.
        read_ahead: gets the positions of the slots, so that it copies remote tars in time; the stream closes it.

    Raises:
        InputError: slots that the order does not have.
    """

    def __init__(
        self,
        order: SampleOrder,
        fetcher: Fetcher,
        *,
        slots: range,
        packing: PadPacking | RowPacking | GroupPacking,
        epochs: int | None,
        limits: Limits = Limits(),
        read_ahead: ReadAhead | None = None,
    ) -> None:
        num_slots = order.identity.num_slots
        if not slots or slots.start < 0 or slots.stop > num_slots:
            raise InputError(f"slots {slots.start}..{slots.stop} do not lie within the {num_slots} of the global batch")
        self.order = order
        self.slots = slots
        self._fetcher = fetcher
        self._read_ahead = read_ahead
        self._limits = limits
        self._quarantine = None if limits.quarantine is None else LineFile(limits.quarantine)
        self._num_ahead = _num_ahead(fetcher.num_workers, len(slots), packing)
        self._excluded: set[tuple[str, str]] = set()
        self._before: dict[str, Any] = {}
        """The slots' states before the last `next_rows`."""
        self._is_taken_back = False
        self._slots: dict[int, _Slot] = {}
        for slot in slots:
            length = order.slot_length(slot)
            end = 0 if length == 0 else None if epochs is None else epochs * length
            self._slots[slot] = _Slot(Packer(packing, order.identity.seed), end)

    def next_rows(self) -> list[Row]:
        """One row for each local slot, in the slots' order; an empty row where a slot has run out.

        Raises:
            InputError: more samples than allowed cannot be used, or one is too long and that is an error.
            AwayError: what they are read from is away; see `take_back`.
        """
        self._before = self._slot_states()
        if self._read_ahead is not None:
            self._read_ahead.advance({number: (slot.next, slot.end) for number, slot in self._slots.items()})
        for slot in self.slots:
            self._look_ahead(slot)
        return [self._slots[slot].packer.next_row(lambda slot=slot: self._next_sample(slot)) for slot in self.slots]  # type: ignore[misc]

    @property
    def exhausted(self) -> bool:
        """Whether every local slot has run out."""
        return all(_is_done(slot) for slot in self._slots.values())

    @property
    def num_bad(self) -> int:
        """Broken samples that the local slots have skipped so far."""
        return sum(slot.num_bad for slot in self._slots.values())

    @property
    def num_too_long(self) -> int:
        """Samples that the local slots have skipped because they are too long."""
        return sum(slot.num_too_long for slot in self._slots.values())

    @property
    def num_shrunk(self) -> int:
        """Images of the local slots that got fewer tiles because their sample would have been too long."""
        return sum(slot.num_shrunk for slot in self._slots.values())

    @property
    def num_drawn(self) -> int:
        """Draws of the local slots so far, usable or not."""
        return sum(slot.next for slot in self._slots.values())

    @property
    def epoch_samples(self) -> int:
        """Samples in one epoch of the whole global batch, all ranks' slots together."""
        return self.order.epoch_samples

    def note(self, entry: dict[str, Any]) -> None:
        """Append a line to the quarantine, where there is one; on a full disk it waits in memory."""
        if self._quarantine is not None:
            self._quarantine.write(entry)

    def sync(self) -> None:
        """Push the quarantine to the disk, before a state that relies on it is saved. Raises OSError on a full disk."""
        if self._quarantine is not None:
            self._quarantine.sync()

    def exclude(self, samples: Iterable[tuple[str, str]]) -> None:
        """Skip these (shard, key) from the next draw on, as if they were broken; the same call on every rank."""
        self._excluded.update(samples)

    def close(self) -> None:
        """End the workers and the read-ahead thread, and close the quarantine."""
        self._fetcher.close()
        if self._quarantine is not None:
            self._quarantine.close()
        if self._read_ahead is not None:
            self._read_ahead.close()

    def state_dict(self) -> dict[str, Any]:
        """The positions of the local slots, as JSON. Merge several ranks' with `merge_states`."""
        return {
            "version": STATE_VERSION,
            **self.order.identity._asdict(),
            "excluded": sorted(self._excluded),
            "slots": self._before if self._is_taken_back else self._slot_states(),
        }

    def _slot_states(self) -> dict[str, Any]:
        return {str(number): _slot_state(slot) for number, slot in self._slots.items()}

    def take_back(self) -> None:
        """The rows of the last `next_rows` are not used: `state_dict` is as before them. Nothing more may be drawn."""
        self._is_taken_back = True

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a merged state; the slots of other ranks are ignored.

        Raises:
            InputError: an unknown version, another data set, seed or number of slots, or a slot that is missing.
        """
        check_state(state, self.order.identity)
        self._fetcher.forget()
        self._is_taken_back = False
        self._excluded = {(shard, key) for shard, key in state["excluded"]}
        for number, slot in self._slots.items():
            if str(number) not in state["slots"]:
                raise InputError(f"the stream's state lacks slot {number}: merge the states of all ranks first")
            self._load_slot(number, slot, state["slots"][str(number)])

    def _load_slot(self, number: int, slot: _Slot, saved: Mapping[str, Any]) -> None:
        slot.next = saved["next"]
        slot.num_bad, slot.num_too_long, slot.num_shrunk = (
            saved[name] for name in ("num_bad", "num_too_long", "num_shrunk")
        )
        slot.num_skipped_in_a_row = 0
        slot.packer.waiting = []
        slot.packer.num_packed = slot.next - slot.num_bad - slot.num_too_long - len(saved["open"])
        slot.ahead.clear()
        refs = [self.order.resolve(number, n) for n in saved["open"]]
        for ref in refs:
            self._fetcher.prefetch(ref)
        for ref in refs:
            sample = self._fetcher.result(ref)
            if isinstance(sample, Encoded):
                slot.packer.waiting.append(sample)
            else:
                self._skip(slot, sample)

    def _look_ahead(self, number: int) -> None:
        """Resolve the slot's next draws, each once, and let workers start on them."""
        slot = self._slots[number]
        last = slot.next + self._num_ahead
        for n in range(slot.next + len(slot.ahead), last if slot.end is None else min(last, slot.end)):
            ref = self.order.resolve(number, n)
            slot.ahead.append(ref)
            self._fetcher.prefetch(ref)

    def _next_sample(self, number: int) -> Encoded | None:
        """The slot's next usable sample, or None where it has run out; skipped samples are recorded."""
        slot = self._slots[number]
        while slot.end is None or slot.next < slot.end:
            ref = slot.ahead.popleft() if slot.ahead else self.order.resolve(number, slot.next)
            sample = self._fetcher.result(ref)
            slot.next += 1
            self._look_ahead(number)
            if isinstance(sample, Encoded) and (ref.shard, ref.key) in self._excluded:
                sample = BadSample(ref, "in quarantine since a step in which its numbers were not finite")
            if isinstance(sample, Encoded):
                slot.num_skipped_in_a_row = 0
                slot.num_shrunk += sample.num_shrunk
                return sample
            self._skip(slot, sample)
            most = max(self.order.slot_length(number), MAX_SKIPPED_IN_A_ROW)
            if slot.end is None and slot.num_skipped_in_a_row >= most:
                raise InputError(
                    f"{slot.num_skipped_in_a_row} draws of slot {number} without a usable sample; the last: {sample}"
                )
        return None

    def _skip(self, slot: _Slot, sample: BadSample) -> None:
        """Count a sample that is not used and write it to the quarantine. Raises InputError beyond the limits."""
        slot.num_skipped_in_a_row += 1
        if sample.kind == "too_long":
            slot.num_too_long += 1
        else:
            slot.num_bad += 1
        ref = sample.ref
        place = {"slot": ref.slot, "n": ref.n, "shard": ref.shard, "key": ref.key}
        self.note({**place, "kind": sample.kind, "reason": sample.reason})
        if sample.kind == "too_long" and self._limits.too_long_is_error:
            raise InputError(f"{sample}; raise max_length, or set too_long: skip")
        num_judged = max(self.num_drawn, MIN_DRAWS_TO_JUDGE)
        if self.num_bad > self._limits.bad_share * num_judged:
            raise InputError(
                f"{self.num_bad} of {self.num_drawn} samples cannot be used, more than {self._limits.bad_share:.0%};"
                f" the last: {sample}. `python -m tools.shards check` lists them"
            )


def _num_ahead(num_workers: int, num_slots: int, packing: PadPacking | RowPacking | GroupPacking) -> int:
    """How many draws of each slot workers may encode ahead of time; 0 without workers."""
    if not num_workers:
        return 0
    ahead = max(2, -(-4 * num_workers // num_slots))
    if isinstance(packing, RowPacking):
        return 4 * ahead  # several samples a row
    if isinstance(packing, GroupPacking):
        return max(ahead, packing.lookahead)  # the next group is ready when this one has left
    return ahead


def _is_done(slot: _Slot) -> bool:
    return slot.end is not None and slot.next >= slot.end and not slot.packer.waiting


def _slot_state(slot: _Slot) -> dict[str, Any]:
    return {
        "next": slot.next,
        "open": [sample.ref.n for sample in slot.packer.waiting],
        "num_bad": slot.num_bad,
        "num_too_long": slot.num_too_long,
        "num_shrunk": slot.num_shrunk,
    }
