"""Which stages of a run have a ledger, and which of them a command is about."""

from __future__ import annotations

from pathlib import Path

from models.common.errors import InputError


def stages_with_ledger(run: Path) -> list[str]:
    """The stages of the run directory `run` that have a ledger, by name.

    Raises:
        InputError: none has.
    """
    stages = sorted(path.parent.name for path in run.glob("*/ledger"))
    if not stages:
        raise InputError(f"{run}: no stage with a ledger here; give the directory that `run` names in a recipe")
    return stages


def choose_stage(run: Path, asked: str | None) -> str:
    """The stage `asked`, or the only one.

    Raises:
        InputError: none has a ledger, there are several, or it is none of them.
    """
    stages = stages_with_ledger(run)
    stage = asked or (stages[0] if len(stages) == 1 else None)
    if stage is None or stage not in stages:
        raise InputError(f"{run}: --stage: name one of {', '.join(stages)}")
    return stage
