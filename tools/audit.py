"""`sightline audit RUN`: proves from the ledger what a run learnt from: no sample lost, none twice, over all starts."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.errors import InputError, run_cli

if TYPE_CHECKING:
    from data_pipeline.stream import RowStream
    from trainer.audit import Account

NUM_NAMED = 10
"""Addresses that are written out of a longer list."""


def main(argv: list[str]) -> int:
    """Audit every stage of a run, or one; 0 when all accounts are clean, else 1."""
    parser = argparse.ArgumentParser(prog="sightline audit", description=__doc__)
    parser.add_argument("run", type=Path, help="a run's directory")
    parser.add_argument("--stage", help="one stage alone")
    arguments = parser.parse_args(argv)
    stages = sorted(path.parent.name for path in arguments.run.glob("*/ledger"))
    if arguments.stage is not None:
        stages = [name for name in stages if name == arguments.stage]
    if not stages:
        raise InputError(
            f"{arguments.run}: no stage with a ledger here; give the directory that `run` names in a recipe"
        )
    accounts = [_audit(arguments.run, stage) for stage in stages]
    return 0 if all(account.is_clean for account in accounts) else 1


def _audit(run: Path, stage: str) -> Account:
    from models.files import write_json
    from trainer.audit import audit

    account = audit(run / stage)
    rows = _rows_of(run, stage)
    epochs = _epochs(account, rows) if rows is not None else {}
    print(f"{stage}: {account.checkpoint}, {account.num_steps} steps, {account.num_batches} global batches, "
          f"{account.num_attempts} starts")  # fmt: skip
    for name in ("learnt", "left_out", "skipped", "rolled_back", "passed_over", "waiting", "lost", "repeated"):
        addresses = getattr(account, name)
        print(f"  {name.replace('_', ' '):<12} {len(addresses):>9,} samples{_named(name, addresses, rows)}")
    if account.missing_batches:
        print(f"  global batches without a line of every rank: {account.missing_batches[:NUM_NAMED]}")
    for epoch, (num_samples, num_twice) in epochs.items():
        print(f"  epoch {epoch}: {num_samples:,} different samples, {num_twice} of them drawn more than once")
    print(f"  {'clean: nothing lost, nothing twice' if account.is_clean else 'NOT CLEAN'}")
    counts = {name: len(value) if isinstance(value, list) else value for name, value in asdict(account).items()}
    write_json(run / stage / "audit.json", {**counts, "clean": account.is_clean, "epochs": epochs})
    return account


def _rows_of(run: Path, stage: str) -> RowStream | None:
    """The stage's order, by which draws have names; None where its data is not on this machine."""
    from models.build import read_facts
    from trainer.opening import open_rows
    from trainer.ranks import Ranks
    from trainer.recipe import Recipe

    try:
        recipe = Recipe.model_validate_json((run / "recipe.json").read_text(encoding="utf-8"))
        facts = read_facts(recipe.model, recipe.stage(stage).data.max_length)
        return open_rows(recipe, stage, facts, Ranks(), None)
    except (InputError, OSError) as error:
        print(f"{stage}: samples are told by slot and number, not by name ({error})")
        return None


def _epochs(account: Account, rows: RowStream) -> dict[int, tuple[int, int]]:
    from data_pipeline.sample import Draw
    from trainer.audit import repeats_within_epochs

    return repeats_within_epochs(
        account, lambda address: rows.name_of(Draw(*address)), lambda address: rows.epoch_of(Draw(*address))
    )


def _named(name: str, addresses: list[Any], rows: RowStream | None) -> str:
    """The first few of the addresses that a person wants to look at."""
    if name in {"learnt", "waiting"} or not addresses:
        return ""
    if rows is None:
        return f": {addresses[:NUM_NAMED]}"
    from data_pipeline.sample import Draw

    return ": " + ", ".join(" ".join(rows.name_of(Draw(*address))) for address in addresses[:NUM_NAMED])


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
