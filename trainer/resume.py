"""Going on from a checkpoint: which one, whether it may be, and a table that says field by field what that means.

Owns the rule of what must match. A rollback is part of it: what was decided once is read back here, so that a run that
is killed afterwards goes on as it would have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_pipeline.stream import RowStream
from models.errors import InputError
from models.files import append_line, read_lines
from trainer.checkpoint import CheckpointReader, newest
from trainer.engine import Engine
from trainer.guard import Guard
from trainer.loss_scale import LossScale
from trainer.ranks import Ranks
from trainer.schedule import Consumed

CONVERTED = ("world_size", "engine", "batch.micro_rows", "data.num_workers")
"""How a run is computed: may change at any start; a checkpoint is converted to it."""

FREE = ("checkpoint", "guard", "validation")
"""What a run says and keeps, and when it gives up."""

ROLLBACKS = "rollbacks.jsonl"


@dataclass(frozen=True)
class Field:
    """One line of the table."""

    name: str
    before: Any
    now: Any
    rule: Literal["must match", "converted", "free"]

    @property
    def differs(self) -> bool:
        """Whether the start and the checkpoint disagree."""
        return bool(self.before != self.now)

    def line(self) -> str:
        """As a person reads it."""
        if not self.differs:
            return f"  {self.name:<24} {self.rule:<11} same"
        verdict = {"must match": "DIFFERS", "converted": "converted", "free": "changed"}[self.rule]
        return f"  {self.name:<24} {self.rule:<11} {verdict}: {_short(self.before)} -> {_short(self.now)}"


def resume_point(directory: Path, record: Mapping[str, Any], ranks: Ranks) -> CheckpointReader | None:
    """The newest sound checkpoint, chosen by the first rank for all; it must have been made by this same stage.

    Raises InputError where it was not, or where checkpoints are there and none is sound: a run that exists is never
    started from nothing.
    """
    chosen: tuple[Path | None, str] = (None, "")
    if ranks.is_first:
        found, passed_over = newest(directory / "checkpoints")
        for reason in passed_over:
            print(f"passed over {reason}", flush=True)
        fault = "" if found is not None or not passed_over else passed_over[0]
        chosen = (found, fault)
    found, fault = ranks.gather(chosen)[0]
    if fault:
        raise InputError(f"{fault}; no checkpoint here is sound: restore one, or start anew with run=ANOTHER_DIRECTORY")
    if found is None:
        return None
    reader = CheckpointReader(found)
    table = compare(reader.state, record)
    if ranks.is_first:
        print("\n".join([f"going on from {found}", *(field.line() for field in table)]), flush=True)
    check_same(table, reader.directory)
    return reader


def compare(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Field]:
    """Every field of a checkpoint's record beside that of the present start."""
    fields = [_field(name, before.get(name), now[name]) for name in ("seed", "model", "base", "world_size")]
    for name, value in now["config"].items():
        old = before["config"].get(name)
        inner = [key for place in CONVERTED for parent, _, key in [place.partition(".")] if parent == name and key]
        if not inner or old is None:
            fields.append(_field(name, old, value))
            continue
        outer = [{key: part for key, part in whole.items() if key not in inner} for whole in (old, value)]
        fields.append(_field(name, *outer))
        fields += [_field(f"{name}.{key}", old.get(key), value[key]) for key in inner]
    return fields


def check_same(table: list[Field], checkpoint: Path) -> None:
    """Raise InputError that lists the fields that must match and do not."""
    differing = [field.name for field in table if field.rule == "must match" and field.differs]
    if differing:
        raise InputError(
            f"{checkpoint}: made with another {', '.join(differing)}; "
            f"take those of {checkpoint.parents[2] / 'recipe.json'}, or start anew with run=ANOTHER_DIRECTORY"
        )


def note_rollback(directory: Path, entry: Mapping[str, Any]) -> None:
    """Record that the run went back to `entry["checkpoint"]` and goes on with the data at `entry["stream"]`."""
    append_line(directory / ROLLBACKS, dict(entry))


def rollbacks(directory: Path) -> list[dict[str, Any]]:
    """Every rollback of a stage, in order."""
    return list(read_lines(directory / ROLLBACKS))


def last_rollback_to(directory: Path, checkpoint: str, batches: int) -> dict[str, Any] | None:
    """The last rollback to a checkpoint: it says where the data goes on, later than the checkpoint's own `batches`."""
    found = [entry for entry in rollbacks(directory) if entry["checkpoint"] == checkpoint]
    return found[-1] if found and found[-1]["consumed"]["batches"] > batches else None


def _field(name: str, before: Any, now: Any) -> Field:
    rule: Literal["must match", "converted", "free"] = "must match"
    if name in CONVERTED:
        rule = "converted"
    elif name in FREE:
        rule = "free"
    return Field(name, before, now, rule)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def load_progress(
    directory: Path,
    reader: CheckpointReader,
    *,
    engine: Engine,
    stream: RowStream,
    guard: Guard,
    loss_scale: LossScale,
) -> Consumed:
    """Moments, guard, scale and data from a checkpoint, the data from where a rollback went on; what is consumed.

    The weights are loaded elsewhere: into the model before an engine is built, or into the engine.
    """
    engine.load_moments(reader.read, int(reader.state["num_updates"]))
    guard.load_state_dict(reader.state["guard"])
    loss_scale.load_state_dict(reader.state["loss_scale"])
    state = reader.state
    rollback = last_rollback_to(directory, reader.directory.name, state["consumed"]["batches"])
    if rollback is not None:
        state = rollback
    stream.load_state_dict(state["stream"])
    return Consumed(**state["consumed"])
