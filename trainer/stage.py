"""One stage of a run, open: what the loop works on, and how its state is saved.

    RUN/recipe.json                          the recipe, resolved
    RUN/lock.json                            who writes here
    RUN/STAGE/checkpoints/, ledger/, ranks/, metrics.jsonl, events.jsonl, quarantine.jsonl, finished.json

How it comes to be open stands in `trainer.opening`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.stream import RowStream, merge_states
from models.files import LineFile
from models.spec import TextSpec
from trainer.best import Best
from trainer.checkpoint import name_of
from trainer.config import StageConfig
from trainer.engine import Engine
from trainer.guard import Guard
from trainer.insight import Insight
from trainer.interrupt import Interrupt
from trainer.ledger import Ledger
from trainer.lock import RunLock
from trainer.loss_scale import LossScale
from trainer.needs import Needs
from trainer.ranks import Ranks
from trainer.recipe import Recipe
from trainer.saving import Saver
from trainer.schedule import Consumed
from trainer.tuning import ParameterGroup
from trainer.validation import Validator
from trainer.watch import Watch


@dataclass
class Stage:
    """One stage of a run, ready to go on from `consumed`."""

    recipe: Recipe
    name: str
    config: StageConfig
    directory: Path
    ranks: Ranks
    device: torch.device
    text: TextSpec
    tokenizer: Any
    needs: Needs | None
    """None where the model's cost is not known from its configuration."""
    groups: list[ParameterGroup]
    engine: Engine
    stream: RowStream
    given: dict[str, Tensor]
    record: dict[str, Any]
    """What every checkpoint of this stage says of itself besides the state of the run."""
    consumed: Consumed
    guard: Guard
    loss_scale: LossScale
    best: Best
    interrupt: Interrupt
    lock: RunLock | None
    """Held by the first rank."""
    watch: Watch
    saver: Saver
    ledger: Ledger
    events: LineFile
    insight: Insight
    validator: Validator | None
    checkpoint: Path | None = None
    """The last one that was committed."""
    longest_step_s: float = 0.0

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches a step, the same on every rank; a rank with fewer rows fills up with empty ones."""
        return micro_batches(self.config, self.ranks.world_size)

    def is_asked_to_stop(self) -> bool:
        """Whether this rank knows of a reason to stop; what the others know, only a sum over the ranks tells."""
        return self.interrupt.is_due(self.longest_step_s, self.saver.longest_s)

    def begin_save(self) -> None:
        """Start to write a checkpoint of the state after the last step; every rank must call it at the same step."""
        self.watch.mark("saving", self.consumed.steps)
        state = {
            **self.record,
            "consumed": asdict(self.consumed),
            "num_updates": self.engine.num_updates,
            "stream": merge_states(self.ranks.gather(self.stream.state_dict())),
            "guard": self.guard.state_dict(),
            "loss_scale": self.loss_scale.state_dict(),
            "best": self.best.state_dict(),
        }
        self.saver.begin(self.consumed.steps, fragments=self.engine.fragments(), given=self.given, state=state)

    def finish_save(self) -> None:
        """Commit the checkpoint on its way. One that cannot be written is a loud line, not the end of the run."""
        written = self.saver.name
        fault = self.saver.finish(spare=[name_of(self.best.step)])
        if not fault:
            self.checkpoint = self.directory / "checkpoints" / written
        elif self.ranks.is_first:
            print(f"warning: {fault}; training goes on, older checkpoints are untouched", flush=True)

    def close(self) -> None:
        """End the data workers, let go of the engine, and give the run directory back."""
        self.stream.close()
        if self.validator is not None:
            self.validator.close()
        self.saver.close()
        self.engine.close()
        for file in (self.ledger, self.events):
            file.close()
        self.watch.close()
        if self.lock is not None:
            self.lock.release()


def micro_batches(config: StageConfig, world_size: int) -> int:
    """How many micro-batches one rank computes for one step."""
    rows_per_rank = math.ceil(config.batch.global_rows / world_size)
    return math.ceil(rows_per_rank / config.batch.micro_rows)
