"""Stand-ins with which step, guard and loop run in milliseconds: an engine of one weight, a stream of lists."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipeline.batch import Batch
from data_pipeline.sample import Encoded, Row
from models.common.files import LineFile
from models.spec import TextSpec
from tests.support.samples import ref
from trainer.config.recipe import Recipe
from trainer.config.schema import GuardConfig
from trainer.distributed.context import DistributedContext
from trainer.distributed.preemption import PreemptionHandler
from trainer.engine.loss_scale import LossScale
from trainer.guard import Guard
from trainer.objectives.loss_sum import LossSum
from trainer.state import RunContext, Services, StageRun, TrainState

TEXT = TextSpec(max_length=64, image_token_id=0, pad_token_id=1, vocab_size=100)


def sample(key: str, num_targets: int = 3, value: int = 5) -> Encoded:
    """A text of `num_targets` + 1 tokens `value`; all but the first are targets."""
    ids = np.full(num_targets + 1, value, dtype=np.int32)
    tiles = np.zeros((0, 1, 1, 3), dtype=np.uint8)
    return Encoded(ref(int(key), key, shard="shard.tar"), ids, ids.copy(), tiles)


def row(*keys: int, num_targets: int = 3) -> Row:
    return tuple(sample(f"{key}", num_targets) for key in keys)


class FakeEngine:
    """One weight w, no process group. The loss of a target is w; `losses` says otherwise for samples by their key.

    `calls` has what was asked of it, in order.
    """

    def __init__(self, losses: dict[str, float] | None = None) -> None:
        self.weight, self.gradient, self.num_updates = 1.0, 0.0, 0
        self.losses = losses or {}
        self.calls: list[str] = []
        self.factors: list[float] = []
        self.groups = [SimpleNamespace(part="projector", names=("weight",), learning_rate=0.5)]
        self.module = torch.nn.Identity()
        self.gradient_factor = 1.0
        """Of the gradient beside the loss: makes one that is not finite over a finite loss."""

    def forward(self, batch: Batch, *, is_last: bool) -> LossSum:
        self.calls.append("forward")
        sums = [sum(self.losses.get(key, self.weight) * 3 for key in keys) if keys else 0.0 for keys in batch.keys]
        rows_B = torch.tensor(sums)
        return LossSum(rows_B.sum(), torch.tensor(batch.num_targets), rows_B)

    def evaluate(self, batch: Batch) -> LossSum:
        return self.forward(batch, is_last=True)

    def backward(self, loss_sum: Tensor, num_targets: float, scale: float = 1.0) -> None:
        self.calls.append("backward")
        self.gradient += float(loss_sum) / num_targets * scale * self.gradient_factor

    def squared_norms(self) -> list[float]:
        return [self.gradient**2]

    def gradients(self) -> Iterable[tuple[str, Tensor]]:
        yield "weight", torch.tensor([self.gradient])

    def learning_rates(self, factor: float) -> list[float]:
        return [factor * 0.5]

    def step(self, factor: float, norm: float, scale: float) -> None:
        self.calls.append("step")
        self.factors.append(factor)
        self.weight -= 0.01 * self.gradient / scale
        self.num_updates += 1
        self.gradient = 0.0

    def discard(self) -> None:
        self.calls.append("discard")
        self.gradient = 0.0

    def fragments(self) -> Iterable[Any]:
        return iter(())

    def set_weights(self, read: Any) -> None:
        self.calls.append("set weights")
        self.weight = 1.0

    def load_moments(self, read: Any, num_updates: int) -> None:
        self.num_updates = num_updates

    def close(self) -> None:
        self.calls.append("close")


class FakeStream:
    """Global batches from a list, each once."""

    def __init__(self, batches: Sequence[list[Row]]) -> None:
        self.batches, self.position = list(batches), 0
        self.num_drawn = self.num_bad = 0
        self.epoch_samples = sum(len(each) for batch in batches for each in batch)
        self.excluded: list[tuple[str, str]] = []
        self.notes: list[dict[str, Any]] = []

    def next_rows(self) -> list[Row]:
        if self.position == len(self.batches):
            return [()]
        rows = self.batches[self.position]
        self.position += 1
        self.num_drawn += sum(len(each) for each in rows)
        return list(rows)

    def exclude(self, samples: Iterable[tuple[str, str]]) -> None:
        self.excluded += list(samples)

    def note(self, entry: dict[str, Any]) -> None:
        self.notes.append(entry)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "slots": {}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]

    def close(self) -> None:
        return None


class FakeCheckpoints:
    """Checkpoints that are written at once and held in memory."""

    longest_s = blocked_s = 0.0

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.finished: list[str] = []
        self.name, self.is_busy, self.is_written = "", False, True
        self.fault = ""

    def begin(self, step: int, **_: Any) -> None:
        self.begun.append(step)
        self.name, self.is_busy = f"step_{step:06d}", True

    def finish(self, spare: Sequence[str] = ()) -> str:
        self.is_busy = False
        if not self.fault:
            self.finished.append(self.name)
        return self.fault

    def close(self) -> None:
        return None


class Recorder:
    """Takes any call and remembers its name."""

    restart = 1

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def running_s(self) -> float:
        return 0.0

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **options: self.calls.append((name, *arguments))


def make_run(
    folder: Path,
    batches: Sequence[list[Row]],
    engine: FakeEngine | None = None,
    *,
    recipe: dict[str, Any] | None = None,
    guard: GuardConfig | None = None,
) -> StageRun:
    """A run of the stage `align` over fakes, in `folder`."""
    values: dict[str, Any] = {
        "name": "fake",
        "seed": 0,
        "run": str(folder),
        "model": {
            "vision": {"kind": "clip", "path": "none"},
            "projector": {"kind": "mlp"},
            "language": {"kind": "pretrained", "path": "none"},
        },
        "stages": {
            "align": {
                "tune": {"projector": {"kind": "full", "learning_rate": 0.5}},
                "data": {"sources": [{"path": "none"}], "template": {"kind": "plain"}, "max_length": 64},
                "duration": {"unit": "steps", "count": 6},
                "batch": {"global_rows": 2, "micro_rows": 1},
                "engine": {"precision": "fp32"},  # the numerics probe needs a real model
                "checkpoint": {"every_steps": 2},
                "schedule": {"kind": "constant", "warmup": 0.0},
                **(recipe or {}),
            }
        },
        "tracking": {"log_every_steps": 1},
    }
    ranks = DistributedContext()
    context = RunContext(
        recipe=Recipe.model_validate(values, strict=False),
        stage="align",
        ranks=ranks,
        device=torch.device("cpu"),
        metadata=SimpleNamespace(text=TEXT, tokenizer=None, image=None),  # type: ignore[arg-type]
        record={},
        estimator=None,
    )
    context.directory.mkdir(parents=True, exist_ok=True)
    state = TrainState(guard or Guard(GuardConfig()), LossScale("fp32"), FakeStream(batches))  # type: ignore[arg-type]
    if isinstance(guard, GuardConfig):
        state.guard = Guard(guard)
    services = Services(
        engine=engine or FakeEngine(),  # type: ignore[arg-type]
        checkpoints=FakeCheckpoints(),  # type: ignore[arg-type]
        ledger=Recorder(),  # type: ignore[arg-type]
        watchdog=Recorder(),  # type: ignore[arg-type]
        preemption=PreemptionHandler(),
        events=LineFile(context.directory / "events.jsonl"),
        validator=None,
        inherited=[],
        lock=None,
    )
    return StageRun(context, state, services)


def is_finite(values: Iterable[float]) -> bool:
    return all(math.isfinite(value) for value in values)
