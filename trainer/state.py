"""The parts of a running stage: constants, the state that a checkpoint holds, and the services.

    RunContext   frozen: recipe, stage, directories, ranks, device, the specs of the model's text and images
    TrainState   what a checkpoint holds in addition to weights and moments; it saves and restores itself
    Services     engine, checkpoints, ledger, watchdog, …: opened once, closed once

A function takes only those that it uses. `trainer.build` builds them; docs/training.md describes the files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from data_pipeline.stream import RowStream
from data_pipeline.stream_state import merge_states
from models.build import ModelMetadata
from models.common.errors import InputError
from models.common.files import LineFile
from trainer.checkpoint.format import Fragment
from trainer.checkpoint.manager import CheckpointManager
from trainer.checkpoint.reader import CheckpointReader
from trainer.checkpoint.resume import last_rollback_to, rollbacks, rollbacks_to
from trainer.config.recipe import Recipe
from trainer.config.schema import StageConfig
from trainer.config.tuning import TuningPlan
from trainer.distributed.context import DistributedContext
from trainer.distributed.preemption import PreemptionHandler
from trainer.distributed.run_lock import RunLock
from trainer.distributed.watchdog import Watchdog
from trainer.engine.engine import Engine
from trainer.engine.loss_scale import LossScale
from trainer.flops.estimator import FlopsEstimator
from trainer.guard import Guard
from trainer.ledger.ledger import Ledger
from trainer.schedule import Consumed, LearningRate
from trainer.validation.best import Best
from trainer.validation.validator import Validator

STATE_VERSION = 1


@dataclass(frozen=True)
class RunContext:
    """What stays the same from the first to the last step of one start of a stage."""

    recipe: Recipe
    stage: str
    ranks: DistributedContext
    device: torch.device
    metadata: ModelMetadata
    record: Mapping[str, Any]
    """The stage's record in every checkpoint: configuration, base digests, ranks. `compare` in checkpoint/resume.py
    compares it with the record of the checkpoint that a start resumes from.
    """
    estimator: FlopsEstimator | None
    """None where the model's cost does not follow from its configuration."""

    @property
    def config(self) -> StageConfig:
        """The stage's part of the recipe."""
        return self.recipe.stage(self.stage)

    @property
    def directory(self) -> Path:
        """RUN/STAGE."""
        return Path(self.recipe.run) / self.stage

    @property
    def title(self) -> str:
        """The stage's name in messages and pages: recipe/stage."""
        return f"{self.recipe.name}/{self.stage}"

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of a step, the same on every rank; a rank with fewer rows fills up with empty ones."""
        return num_micro_batches(self.config, self.ranks.world_size)

    def learning_rate(self, epoch_samples: int) -> LearningRate:
        """The stage's learning rate over data of which an epoch has so many samples."""
        return LearningRate(self.config.schedule, self.config.duration, epoch_samples, self.config.batch.global_rows)


def num_micro_batches(config: StageConfig, world_size: int) -> int:
    """How many micro-batches one rank computes for one step."""
    return config.batch.num_micro_batches(world_size)


@dataclass
class TrainState:
    """What a checkpoint holds besides weights and Adam's moments; equal on every rank but for the stream's rows."""

    guard: Guard
    loss_scale: LossScale
    stream: RowStream
    """Its position is the state."""
    best: Best = field(default_factory=Best)
    consumed: Consumed = field(default_factory=Consumed)
    reached: set[str] = field(default_factory=set)
    """Parts of the model that have had a gradient in some step."""
    num_rollbacks: int = 0
    """How often the run went back on its way here."""

    def state_dict(self, ranks: DistributedContext, *, num_updates: int) -> dict[str, Any]:
        """As JSON; `num_updates` is Adam's count. Every rank must call it: the streams' positions are gathered."""
        return {
            "state_version": STATE_VERSION,
            "consumed": asdict(self.consumed),
            "num_updates": num_updates,
            "stream": merge_states(ranks.gather(self.stream.state_dict())),
            "guard": self.guard.state_dict(),
            "loss_scale": self.loss_scale.state_dict(),
            "best": self.best.state_dict(),
            "reached": sorted(self.reached),
            "num_rollbacks": self.num_rollbacks,
        }

    def load_progress(self, reader: CheckpointReader, directory: Path) -> None:
        """Restore everything but `best` from a checkpoint, with the data's position of the last rollback to it, if any.

        A rollback in a running stage calls this too; the best validation so far is kept.

        Raises:
            InputError: the checkpoint's state has a version that this program does not read.
        """
        saved = reader.state
        version = saved.get("state_version", STATE_VERSION)
        if version != STATE_VERSION:
            raise InputError(
                f"{reader.directory}: its state has version {version}, this program reads {STATE_VERSION}; "
                "go on with the version that wrote it"
            )
        self.guard.load_state_dict(reader.part("guard"))
        self.loss_scale.load_state_dict(reader.part("loss_scale"))
        self.reached = set(saved.get("reached", TuningPlan.model_fields))  # an older version did not look
        self.num_rollbacks = _num_rollbacks(reader, directory)
        position = last_rollback_to(directory, reader) or {key: reader.part(key) for key in ("stream", "consumed")}
        self.stream.load_state_dict(position["stream"])
        self.consumed = Consumed(**position["consumed"])

    def load(self, reader: CheckpointReader, directory: Path) -> None:
        """Restore everything from the checkpoint that a start resumes from."""
        self.load_progress(reader, directory)
        saved = reader.part("best")
        validation = reader.state.get("config", {}).get("validation") or {}  # an older best is by its recipe's metric
        self.best = Best(**{"measure": validation.get("metric", ""), **saved})


def _num_rollbacks(reader: CheckpointReader, directory: Path) -> int:
    """Rollbacks before a checkpoint and those to it; one of an older version does not say, and all records count."""
    before = reader.state.get("num_rollbacks")
    return len(rollbacks(directory)) if before is None else int(before) + len(rollbacks_to(directory, reader))


@dataclass(frozen=True)
class Services:
    """The services of a stage. Opened by `trainer.build`, closed by `close`."""

    engine: Engine
    checkpoints: CheckpointManager
    ledger: Ledger
    watchdog: Watchdog
    preemption: PreemptionHandler
    events: LineFile
    validator: Validator | None
    inherited: Sequence[Fragment]
    """What this rank writes of weights that are not trained here and are in no pretrained base."""
    lock: RunLock | None
    """Held by the first rank."""


@dataclass(frozen=True)
class StageRun:
    """One start of a stage, ready to continue after what its state has consumed."""

    context: RunContext
    state: TrainState
    services: Services
    resumed_from: Path | None = None
    """The checkpoint that this start resumed from."""

    def close(self) -> None:
        """End data workers, writers and threads, release the engine, and release the run directory last.

        The lock goes last since the thread that deletes old checkpoints must have ended when another start may write.
        """
        services = self.services
        with ExitStack() as stack:
            stack.callback(self.abandon)
            stack.callback(services.watchdog.close)
            stack.callback(services.events.close)
            stack.callback(services.ledger.close)
            stack.callback(services.engine.close)
            if services.validator is not None:
                stack.callback(services.validator.close)
            stack.callback(self.state.stream.close)

    def abandon(self) -> None:
        """After an error: wait for the checkpoint threads, then release the run directory."""
        self.services.checkpoints.close()
        if self.services.lock is not None:
            self.services.lock.release()
