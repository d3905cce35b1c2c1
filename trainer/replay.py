"""Recomputes one step of a run: the weights before it from a checkpoint, its rows from the ledger's draws.

    nearest checkpoint before the step --> the steps between, again --> the step's rows and loss,
                                                                        compared with the ledger's

Everything is written to a separate directory; the run is only read. One process computes what all ranks did, so a loss
agrees to the rounding of a sum in another order (bit for bit where the run was on one rank too).
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.sample import Row
from models.common.errors import InputError
from trainer.build import build_stage
from trainer.checkpoint.format import checkpoints_in, fault_of, step_of
from trainer.checkpoint.reader import CheckpointReader
from trainer.checkpoint.records import ROLLBACKS
from trainer.config.recipe import Recipe
from trainer.distributed.context import DistributedContext
from trainer.inputs import check_replayed
from trainer.ledger.restarts import find_step, read_restarts
from trainer.loop import Loop


@dataclass(frozen=True)
class Replay:
    """A recomputed step, and the ledger's values for it."""

    step: int
    batch: int
    checkpoint: str
    logged_loss: float
    loss: float
    same_rows: bool
    rows: list[Row]
    row_losses: list[float]
    """Per row, summed over its targets."""

    @property
    def difference(self) -> float:
        """Relative, of the losses."""
        return abs(self.loss - self.logged_loss) / max(abs(self.logged_loss), 1e-12)


def replay(recipe: Recipe, stage: str, step: int) -> Replay:
    """Recompute `step` of a stage. Raises InputError where there is no earlier checkpoint or it was never taken."""
    directory = Path(recipe.run) / stage
    batch, logged_loss, draws = _logged(directory, step)
    checkpoint = _checkpoint_before(directory, step)
    if checkpoint is None:  # where there is one, the start from it compares
        check_replayed(recipe, stage)
    with tempfile.TemporaryDirectory(prefix="replay_") as folder:
        _mirror(recipe, stage, checkpoint, Path(folder))
        opened = build_stage(recipe.model_copy(update={"run": folder}), stage, DistributedContext())
        try:
            loop = Loop(opened)
            loop.start()
            result = None
            while (num_steps := opened.state.consumed.steps) < step:
                result = loop.advance()
                if result is None:
                    raise InputError(f"{directory}: the data ended after step {num_steps}, before {step}")
        finally:
            opened.close()
    assert result is not None
    found = {(sample.ref.slot, sample.ref.n) for row in result.rows for sample in row}
    name = "the stage's start" if checkpoint is None else checkpoint.name
    return Replay(
        step, batch, name, logged_loss, result.loss, found == draws, result.rows, result.row_losses
    )  # fmt: skip


def _logged(directory: Path, step: int) -> tuple[int, float, set[tuple[int, int]]]:
    """The batch that became a step for good, its loss and its draws."""
    found = find_step(read_restarts(directory / "ledger"), step)
    if found is None:
        raise InputError(f"{directory}: the ledger knows of no step {step}")
    batch, lines = found
    return batch, lines[0]["loss"], {(slot, n) for line in lines for slot, n in line["draws"]}


def _checkpoint_before(directory: Path, step: int) -> Path | None:
    """The newest complete checkpoint before a step; None for the stage's start, where no rollback lies between."""
    found = checkpoints_in(directory / "checkpoints")
    for path in reversed(found):
        if step_of(path.name) < step and fault_of(path) is None:
            return path
    if step > 100:
        held = ", ".join(path.name for path in found)
        raise InputError(
            f"{directory}: no checkpoint before step {step} is kept (there are {held}); raise checkpoint.keep"
        )
    return None


def _mirror(recipe: Recipe, stage: str, checkpoint: Path | None, folder: Path) -> None:
    """A run directory with only what the replay may read: the earlier stages, one checkpoint, the rollbacks to it."""
    run = Path(recipe.run).resolve()
    for name in recipe.stages:
        if name != stage and (run / name).is_dir():
            (folder / name).symlink_to(run / name)
    (folder / stage / "checkpoints").mkdir(parents=True)
    if checkpoint is None:
        return
    CheckpointReader.open(checkpoint)
    (folder / stage / "checkpoints" / checkpoint.name).symlink_to(checkpoint.resolve())
    if (run / stage / ROLLBACKS).is_file():
        (folder / stage / ROLLBACKS).write_bytes((run / stage / ROLLBACKS).read_bytes())
