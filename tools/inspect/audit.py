"""`sightline audit RUN`: proves from the ledger which data a run was trained on: no sample lost, none twice, over all
starts.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.common.errors import InputError, run_cli
from tools.inspect.stages import choose_stage, stages_with_ledger

if TYPE_CHECKING:
    from data_pipeline.stream import RowStream
    from trainer.ledger.audit import Account

NUM_NAMED = 10
"""Draws that are printed of a longer list."""


def main(argv: list[str]) -> int:
    """Audit every stage of a run, or one; returns 0 if all accounts are clean, else 1."""
    parser = argparse.ArgumentParser(prog="sightline audit", description=__doc__)
    parser.add_argument("run", type=Path, help="a run's directory")
    parser.add_argument("--stage", help="one stage alone")
    arguments = parser.parse_args(argv)
    stages = stages_with_ledger(arguments.run)
    if arguments.stage is not None:
        stages = [choose_stage(arguments.run, arguments.stage)]
    accounts = [_audit(arguments.run, stage) for stage in stages]
    return 0 if all(account.is_clean for account in accounts) else 1


def _audit(run: Path, stage: str) -> Account:
    from models.common.files import write_json
    from trainer.ledger.audit import audit

    account = audit(run / stage)
    rows = _rows_of(run, stage)
    epochs = _epochs(account, rows) if rows is not None else {}
    print(f"{stage}: {account.checkpoint}, {account.num_steps} steps, {account.num_batches} global batches, "
          f"{account.num_restarts} starts")  # fmt: skip
    listed = {fate.name.lower(): addresses for fate, addresses in account.draws.items()}
    for name, addresses in {**listed, "lost": account.lost, "repeated": account.repeated}.items():
        print(f"  {name.replace('_', ' '):<12} {len(addresses):>9,} samples{_named(name, addresses, rows)}")
    if account.missing_batches:
        print(f"  global batches without a line of every rank: {account.missing_batches[:NUM_NAMED]}")
    for epoch, (num_samples, num_twice) in epochs.items():
        print(f"  epoch {epoch}: {num_samples:,} different samples, {num_twice} of them drawn more than once")
    print(f"  {'clean: nothing lost, nothing twice' if account.is_clean else 'NOT CLEAN'}")
    write_json(run / stage / "audit.json", {**_summary(account), "epochs": epochs})
    return account


def _summary(account: Account) -> dict[str, Any]:
    """The account in numbers, under its names on disk."""
    return {
        "checkpoint": account.checkpoint,
        "num_batches": account.num_batches,
        "num_steps": account.num_steps,
        "num_attempts": account.num_restarts,
        **{fate.value: len(addresses) for fate, addresses in account.draws.items()},
        "lost": len(account.lost),
        "repeated": len(account.repeated),
        "missing_batches": len(account.missing_batches),
        "clean": account.is_clean,
    }


def _rows_of(run: Path, stage: str) -> RowStream | None:
    """The stage's order, which gives draws their sample names; None where its data is not on this machine."""
    from models.build import read_metadata
    from trainer.config.recipe import load_recipe
    from trainer.distributed.context import DistributedContext
    from trainer.inputs import open_rows

    try:
        recipe = load_recipe(run / "recipe.json")
        facts = read_metadata(recipe.model, recipe.stage(stage).data.max_length)
        return open_rows(recipe, stage, facts, DistributedContext(), None)
    except (InputError, OSError) as error:
        print(f"{stage}: samples are told by slot and number, not by name ({error})")
        return None


def _epochs(account: Account, rows: RowStream) -> dict[int, tuple[int, int]]:
    from trainer.ledger.audit import repeats_within_epochs

    return repeats_within_epochs(account, rows.order)


def _named(name: str, addresses: Sequence[tuple[int, int]], rows: RowStream | None) -> str:
    """The first few draws of a list, with their samples' names."""
    if name in {"learnt", "waiting"} or not addresses:
        return ""
    if rows is None:
        return f": {addresses[:NUM_NAMED]}"
    return ": " + ", ".join(" ".join(_name(rows, address)) for address in addresses[:NUM_NAMED])


def _name(rows: RowStream, address: tuple[int, int]) -> tuple[str, str]:
    """The (shard, key) that a draw, (row, number), resolves to."""
    ref = rows.order.resolve(*address)
    return ref.shard, ref.key


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
