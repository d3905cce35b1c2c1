"""The rows that one rank takes from the global stream, step by step, and where it stands.

Owns drawing, the replacement and count of bad samples, and the state that resumes. Does not own order (`order`,
`mixture`), encoding (`encode`) nor tensors (`batch`).

A rank owns a run of slots of the global batch. Each slot draws, packs and runs out on its own; the state is, per slot,
the next draw and the draws that wait in an open pack, so states of all ranks merge by slot and load on any other number
of ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.config import GroupPacking, PadPacking, RowPacking
from data_pipeline.fetch import Encode, Fetcher, Naming
from data_pipeline.mixture import Plan
from data_pipeline.packing import Packer
from data_pipeline.read_ahead import ReadAhead
from data_pipeline.sample import BadSample, Draw, Encoded, Row
from models.errors import InputError
from models.files import LineFile

STATE_VERSION = 2
MIN_DRAWS_TO_JUDGE = 200
"""The share of bad samples is judged against at least so many draws, so that an unlucky start stops nothing."""

MIN_DRAWS_IN_VAIN = 1000
"""So many draws of an endless slot in a row without a usable sample (at least an epoch of it) stop the run."""


@dataclass(slots=True)
class _Slot:
    """Where one slot stands."""

    packer: Packer
    end: int | None
    """Draws until it runs out; None: never."""
    next: int = 0
    num_bad: int = 0
    num_too_long: int = 0
    num_shrunk: int = 0
    num_in_vain: int = 0
    """Draws since the last usable sample."""


@dataclass(frozen=True)
class Limits:
    """What a stream does about samples it cannot use."""

    bad_share: float = 0.05
    too_long_is_error: bool = False
    quarantine: Path | None = field(default=None)
    """A JSON Lines file; one line per sample that was passed over: slot, n, shard, key, kind, reason."""


class RowStream:
    """Rows of the slots in `slots`, of `num_slots` in the global batch.

    Args:
        encode: the worker's function; see `data_pipeline.encode.Encoder`.
        plan: which sample each draw is.
        fingerprint: of everything the order depends on; a state with another one is refused.
        epochs: how often every sample is seen; None: without end.
        read_ahead: told where the slots stand, so that it copies remote tars in time.
    """

    def __init__(
        self,
        encode: Encode,
        plan: Plan,
        *,
        fingerprint: str,
        seed: int,
        num_slots: int,
        slots: range,
        packing: PadPacking | RowPacking | GroupPacking,
        num_workers: int,
        epochs: int | None,
        limits: Limits = Limits(),
        read_ahead: ReadAhead | None = None,
    ) -> None:
        if not slots or slots.start < 0 or slots.stop > num_slots:
            raise InputError(f"slots {slots.start}..{slots.stop} do not lie within the {num_slots} of the global batch")
        self.fingerprint, self.seed, self.num_slots, self.slots = fingerprint, seed, num_slots, slots
        self._plan = plan
        self._limits = limits
        self._quarantine = None if limits.quarantine is None else LineFile(limits.quarantine)
        self._encode = encode
        self._fetcher = Fetcher(encode, num_workers)
        self._read_ahead = read_ahead
        self._ahead = max(2, -(-4 * num_workers // len(slots))) if num_workers else 0
        if isinstance(packing, RowPacking):
            self._ahead *= 4  # several samples a row
        if isinstance(packing, GroupPacking) and num_workers:
            self._ahead = max(self._ahead, packing.lookahead)  # the next group is ready when this one has left
        self._excluded: set[tuple[str, str]] = set()
        self._slots: dict[int, _Slot] = {}
        for slot in slots:
            length = plan.slot_length(slot)
            end = 0 if length == 0 else None if epochs is None else epochs * length
            self._slots[slot] = _Slot(Packer(packing, seed), end)

    def next_rows(self) -> list[Row]:
        """One row for each local slot, in the slots' order; an empty row where a slot has run out.

        Raises:
            InputError: more samples than allowed cannot be used, or one is too long and that is an error.
        """
        if self._read_ahead is not None:
            self._read_ahead.advance({number: (slot.next, slot.end) for number, slot in self._slots.items()})
        for slot in self.slots:
            self._prefetch(slot)
        return [self._slots[slot].packer.next_row(lambda slot=slot: self._draw(slot)) for slot in self.slots]  # type: ignore[misc]

    @property
    def exhausted(self) -> bool:
        """Whether every local slot has run out."""
        return all(_is_done(slot) for slot in self._slots.values())

    @property
    def num_bad(self) -> int:
        """Broken samples passed over by the local slots so far."""
        return sum(slot.num_bad for slot in self._slots.values())

    @property
    def num_too_long(self) -> int:
        """Samples passed over by the local slots because they are too long."""
        return sum(slot.num_too_long for slot in self._slots.values())

    @property
    def num_shrunk(self) -> int:
        """Pictures of the local slots that got fewer tiles because their sample would have been too long."""
        return sum(slot.num_shrunk for slot in self._slots.values())

    @property
    def num_drawn(self) -> int:
        """Draws taken by the local slots so far, usable or not."""
        return sum(slot.next for slot in self._slots.values())

    @property
    def epoch_samples(self) -> int:
        """Samples in one epoch of the whole global batch, all ranks' slots together."""
        return sum(self._plan.slot_length(slot) for slot in range(self.num_slots))

    def name_of(self, draw: Draw) -> tuple[str, str]:
        """(shard, key) of a draw of any slot, without reading it; ("", "") where the encoder knows no names."""
        return self._encode.name_of(draw) if isinstance(self._encode, Naming) else ("", "")

    def epoch_of(self, draw: Draw) -> int:
        """The epoch, from 0, that a draw belongs to in its slot."""
        return draw.n // max(1, self._plan.slot_length(draw.slot))

    def note(self, entry: dict[str, Any]) -> None:
        """A line of the quarantine, where there is one; on a full disk it waits."""
        if self._quarantine is not None:
            self._quarantine.write(entry)

    def sync(self) -> None:
        """Push the quarantine to the disk: ahead of a state that relies on it. OSError where it is not taken."""
        if self._quarantine is not None:
            self._quarantine.sync()

    def exclude(self, samples: Iterable[tuple[str, str]]) -> None:
        """Pass over these (shard, key) from the next draw on, as if they were broken: told alike on every rank."""
        self._excluded.update(samples)

    def close(self) -> None:
        """End the workers."""
        self._fetcher.close()
        if self._quarantine is not None:
            self._quarantine.close()
        if self._read_ahead is not None:
            self._read_ahead.close()

    def state_dict(self) -> dict[str, Any]:
        """Where the local slots stand, as JSON. Merge several ranks' with `merge_states`."""
        return {
            "version": STATE_VERSION,
            "fingerprint": self.fingerprint,
            "seed": self.seed,
            "num_slots": self.num_slots,
            "excluded": sorted(self._excluded),
            "slots": {str(number): _slot_state(slot) for number, slot in self._slots.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a merged state stands; other ranks' slots are passed over.

        Raises:
            InputError: an unknown version, another data set, seed or number of slots, or a slot that is missing.
        """
        check_state(state, self.fingerprint, self.seed, self.num_slots)
        self._fetcher.forget()
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
        slot.num_in_vain = 0
        slot.packer.open = []
        slot.packer.num_left = slot.next - slot.num_bad - slot.num_too_long - len(saved["open"])
        for n in saved["open"]:
            self._fetcher.prefetch(Draw(number, n))
        for n in saved["open"]:
            sample = self._fetcher.result(Draw(number, n))
            if isinstance(sample, Encoded):
                slot.packer.open.append(sample)
            else:
                self._pass_over(slot, sample)

    def _prefetch(self, number: int) -> None:
        slot = self._slots[number]
        last = slot.next + self._ahead
        for n in range(slot.next, last if slot.end is None else min(last, slot.end)):
            self._fetcher.prefetch(Draw(number, n))

    def _draw(self, number: int) -> Encoded | None:
        """The slot's next usable sample; what is passed over on the way is counted and named."""
        slot = self._slots[number]
        while slot.end is None or slot.next < slot.end:
            sample = self._fetcher.result(Draw(number, slot.next))
            slot.next += 1
            self._prefetch(number)
            if isinstance(sample, Encoded) and (sample.shard, sample.key) in self._excluded:
                reason = "in quarantine since a step in which its numbers were not finite"
                sample = BadSample(sample.draw, sample.shard, sample.key, reason)
            if isinstance(sample, Encoded):
                slot.num_in_vain = 0
                slot.num_shrunk += sample.num_shrunk
                return sample
            self._pass_over(slot, sample)
            if slot.end is None and slot.num_in_vain >= max(self._plan.slot_length(number), MIN_DRAWS_IN_VAIN):
                raise InputError(
                    f"{slot.num_in_vain} draws of slot {number} without a usable sample; the last:"
                    f" {sample.shard} {sample.key}: {sample.reason}"
                )
        return None

    def _pass_over(self, slot: _Slot, sample: BadSample) -> None:
        slot.num_in_vain += 1
        if sample.kind == "too_long":
            slot.num_too_long += 1
        else:
            slot.num_bad += 1
        entry = asdict(sample)
        self.note(entry | entry.pop("draw"))
        last = f"{sample.shard} {sample.key}: {sample.reason}"
        if sample.kind == "too_long" and self._limits.too_long_is_error:
            raise InputError(f"{last}; raise max_length, or set too_long: skip")
        num_judged = max(self.num_drawn, MIN_DRAWS_TO_JUDGE)
        if self.num_bad > self._limits.bad_share * num_judged:
            raise InputError(
                f"{self.num_bad} of {self.num_drawn} samples cannot be used, more than {self._limits.bad_share:.0%};"
                f" the last: {last}. `python -m tools.shards check` lists them"
            )


def _is_done(slot: _Slot) -> bool:
    return slot.end is not None and slot.next >= slot.end and not slot.packer.open


def _slot_state(slot: _Slot) -> dict[str, Any]:
    return {
        "next": slot.next,
        "open": [sample.draw.n for sample in slot.packer.open],
        "num_bad": slot.num_bad,
        "num_too_long": slot.num_too_long,
        "num_shrunk": slot.num_shrunk,
    }


def merge_states(states: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The states of all ranks as one.

    Raises:
        InputError: they belong to different streams.
    """
    merged: dict[str, Any] = {}
    for state in states:
        if not merged:
            merged = {**state, "slots": dict(state["slots"])}
            continue
        check_state(state, merged["fingerprint"], merged["seed"], merged["num_slots"])
        merged["slots"] |= state["slots"]
    return merged


def check_state(state: Mapping[str, Any], fingerprint: str, seed: int, num_slots: int) -> None:
    """Refuse a state that this stream cannot go on from, and say why."""
    if state.get("version") != STATE_VERSION:
        raise InputError(f"a stream state of version {state.get('version')}; this program reads {STATE_VERSION}")
    expected = {"fingerprint": fingerprint, "seed": seed, "num_slots": num_slots}
    for name, value in expected.items():
        if state.get(name) != value:
            raise InputError(
                f"the stream's state has {name} {state.get(name)!r}, this run has {value!r}: the order of the data"
                " would be another; use the same data, seed and global batch, or start anew"
            )
