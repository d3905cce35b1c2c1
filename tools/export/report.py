"""The parity report of a format that is no bundle: parity.json beside what was written."""

from __future__ import annotations

from pathlib import Path

from models.bundle import Parity
from models.common.errors import InputError
from models.common.files import write_json

NAME = "parity.json"


def insist(parity: Parity, refusal: str, force: bool) -> None:
    """Raise InputError, prefixed by `refusal`, where a check fails, unless forced."""
    from tools.export.parity import failed_checks

    if not parity.passed and not force:
        raise InputError(f"{refusal} ({failed_checks(parity)}); --force writes it all the same")


def write_parity(directory: Path, parity: Parity) -> None:
    """Write parity.json, in the form of the report in sightline.json."""
    write_json(directory / NAME, {**parity.model_dump(mode="json"), "forced": not parity.passed})
