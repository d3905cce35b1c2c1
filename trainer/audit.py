"""What a stage learnt from, proved from its ledger: every draw accounted for once, over all restarts.

    ledger lines that stand --> draws learnt from, left out, skipped
    quarantine.jsonl        --> draws passed over         }  together: 0, 1, 2, ... next - 1 of every slot,
    rollbacks.jsonl         --> draws skipped on purpose  }  each exactly once
    newest checkpoint       --> draws waiting in a pack, and where each slot stands

Owns the arithmetic. Needs neither the model nor a process group.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from models.errors import InputError
from models.files import read_lines
from trainer.checkpoint import CheckpointReader, newest
from trainer.ledger import Attempt, read_attempts, standing
from trainer.resume import rollbacks

Address = tuple[int, int]
"""(slot, n) of a draw."""


@dataclass
class Account:
    """What became of every draw up to a checkpoint."""

    checkpoint: str
    num_batches: int
    num_steps: int
    num_attempts: int
    learnt: list[Address] = field(default_factory=list)
    left_out: list[Address] = field(default_factory=list)
    skipped: list[Address] = field(default_factory=list)
    rolled_back: list[Address] = field(default_factory=list)
    passed_over: list[Address] = field(default_factory=list)
    waiting: list[Address] = field(default_factory=list)
    lost: list[Address] = field(default_factory=list)
    """Drawn, and in no record: 0 of them in a sound run."""
    repeated: list[Address] = field(default_factory=list)
    """In the records more than once: 0 of them in a sound run."""
    missing_batches: list[int] = field(default_factory=list)
    """Global batches that not every rank has a line of."""

    @property
    def is_clean(self) -> bool:
        """Nothing lost, nothing repeated, no batch without its lines."""
        return not (self.lost or self.repeated or self.missing_batches)


def audit(directory: Path) -> Account:
    """The account of a stage's directory up to its newest sound checkpoint. Raises InputError where there is none."""
    found, _ = newest(directory / "checkpoints")
    if found is None:
        raise InputError(f"{directory}: no sound checkpoint, so nothing has been learnt that could be proved")
    state = CheckpointReader(found).state
    attempts = read_attempts(directory / "ledger")
    last = int(state["consumed"]["batches"])
    lines = {batch: entry for batch, entry in standing(attempts).items() if batch <= last}
    account = Account(found.name, last, int(state["consumed"]["steps"]), len(attempts))
    undone = _undone(directory, lines)
    for batch in range(1, last + 1):
        _enter(account, batch, lines.get(batch), batch in undone)
    slots = state["stream"]["slots"]
    account.waiting = [(int(slot), n) for slot, entry in slots.items() for n in entry["open"]]
    used = {*account.learnt, *account.left_out, *account.skipped, *account.rolled_back, *account.waiting}
    account.passed_over = sorted(_passed_over(directory, slots) - used)
    _balance(account, slots)
    return account


def _undone(directory: Path, lines: dict[int, tuple[Attempt, list[dict[str, Any]]]]) -> set[int]:
    """Batches whose updates a rollback took back, as far as the attempt that went back is the one that counts."""
    undone = set()
    for entry in rollbacks(directory):
        for batch in range(entry["first_batch"], entry["last_batch"] + 1):
            if batch in lines and lines[batch][0].number <= entry["attempt"]:
                undone.add(batch)
    return undone


def _enter(account: Account, batch: int, entry: tuple[Attempt, list[dict[str, Any]]] | None, is_undone: bool) -> None:
    if entry is None or len(entry[1]) != entry[0].world_size:
        account.missing_batches.append(batch)
        return
    for line in entry[1]:
        drawn = [(slot, n) for slot, n in line["draws"]]
        if is_undone:
            account.rolled_back += drawn
        elif line["step"] is None:
            account.skipped += drawn
        else:
            account.learnt += drawn
        account.left_out += [(slot, n) for slot, n in line["left_out"]]


def _passed_over(directory: Path, slots: dict[str, Any]) -> set[Address]:
    """Draws that gave no usable sample, by the quarantine; a start that draws them again names them again."""
    return {
        (line["slot"], line["n"])
        for line in read_lines(directory / "quarantine.jsonl")
        if line["kind"] != "not_finite" and line["n"] < slots[str(line["slot"])]["next"]
    }


def _balance(account: Account, slots: dict[str, Any]) -> None:
    counts: Counter[Address] = Counter()
    for share in (account.learnt, account.left_out, account.skipped, account.rolled_back):
        counts.update(share)
    counts.update(account.passed_over)
    counts.update(account.waiting)
    expected = {(int(slot), n) for slot, entry in slots.items() for n in range(entry["next"])}
    account.lost = sorted(expected - counts.keys())
    account.repeated = sorted(address for address, count in counts.items() if count > 1 or address not in expected)


def repeats_within_epochs(
    account: Account, name_of: Callable[[Address], tuple[str, str]], epoch_of: Callable[[Address], int]
) -> dict[int, tuple[int, int]]:
    """Epoch -> (samples drawn, samples drawn more than once), by their names in the data."""
    drawn: dict[int, Counter[tuple[str, str]]] = {}
    for share in (account.learnt, account.left_out, account.skipped, account.rolled_back, account.passed_over):
        for address in share:
            drawn.setdefault(epoch_of(address), Counter())[name_of(address)] += 1
    return {
        epoch: (len(names), sum(1 for count in names.values() if count > 1)) for epoch, names in sorted(drawn.items())
    }
