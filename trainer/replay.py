"""A step of a run computed again, alone: the weights before it from a checkpoint, its rows from the ledger's draws.

    nearest checkpoint before the step --> the steps between, again --> the step's rows and loss
                                                                        beside what the ledger says of it

Everything happens in a directory of its own; the run is only read. One process computes what all ranks did, so a loss
agrees to the rounding of a sum in another order (bit for bit where the run was on one rank too).
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.sample import Row
from models.errors import InputError
from trainer.checkpoint import CheckpointReader, fault_of
from trainer.ledger import read_attempts, standing
from trainer.loop import Loop
from trainer.opening import open_stage
from trainer.ranks import Ranks
from trainer.recipe import Recipe
from trainer.resume import ROLLBACKS


@dataclass(frozen=True)
class Replay:
    """A step computed again, and what the ledger says of it."""

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
    """Compute `step` of a stage again. Raises InputError where no checkpoint lies before it or it was never taken."""
    directory = Path(recipe.run) / stage
    batch, logged_loss, draws = _logged(directory, step)
    checkpoint = _checkpoint_before(directory, step)
    with tempfile.TemporaryDirectory(prefix="replay_") as folder:
        _mirror(recipe, stage, checkpoint, Path(folder))
        opened = open_stage(recipe.model_copy(update={"run": folder}), stage, Ranks())
        try:
            loop = Loop(opened)
            result = None
            while opened.consumed.steps < step:
                result = loop.advance()
                if result is None:
                    raise InputError(f"{directory}: the data ended after step {opened.consumed.steps}, before {step}")
        finally:
            opened.close()
    assert result is not None
    found = {(sample.draw.slot, sample.draw.n) for row in result.rows for sample in row}
    name = "the stage's start" if checkpoint is None else checkpoint.name
    return Replay(
        step, batch, name, logged_loss, result.loss, found == draws, result.rows, result.sums.row_losses
    )  # fmt: skip


def _logged(directory: Path, step: int) -> tuple[int, float, set[tuple[int, int]]]:
    """The batch that became a step for good, its loss and its draws."""
    for batch, (_, lines) in sorted(standing(read_attempts(directory / "ledger")).items(), reverse=True):
        if lines[0]["step"] == step:
            return batch, lines[0]["loss"], {(slot, n) for line in lines for slot, n in line["draws"]}
    raise InputError(f"{directory}: the ledger knows of no step {step}")


def _checkpoint_before(directory: Path, step: int) -> Path | None:
    """The newest sound checkpoint before a step; None for the start, where the stage has not lost its way to it."""
    found = sorted((directory / "checkpoints").glob("step_*"), reverse=True)
    for path in found:
        if int(path.name.split("_")[1]) < step and fault_of(path) is None:
            return path
    if step > 100:
        held = ", ".join(path.name for path in reversed(found))
        raise InputError(
            f"{directory}: no checkpoint before step {step} is kept (there are {held}); raise checkpoint.keep"
        )
    return None


def _mirror(recipe: Recipe, stage: str, checkpoint: Path | None, folder: Path) -> None:
    """A run directory that shows what the replay may read: the stages before, one checkpoint, the rollbacks to it."""
    run = Path(recipe.run).resolve()
    for name in recipe.stages:
        if name != stage and (run / name).is_dir():
            (folder / name).symlink_to(run / name)
    (folder / stage / "checkpoints").mkdir(parents=True)
    if checkpoint is None:
        return
    CheckpointReader(checkpoint)
    (folder / stage / "checkpoints" / checkpoint.name).symlink_to(checkpoint.resolve())
    if (run / stage / ROLLBACKS).is_file():
        (folder / stage / ROLLBACKS).write_bytes((run / stage / ROLLBACKS).read_bytes())
