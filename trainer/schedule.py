"""The learning rate as a pure function of a stage's progress; nothing here has state.

recipe: schedule, duration --> LearningRate --.at(consumed)--> factor --> Engine.step: peak rate of a group x factor
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

from models.common.errors import InputError
from trainer.config.schema import Duration, Schedule


@dataclass(frozen=True)
class Consumed:
    """What a stage has consumed so far, over all ranks.

    `steps`, `samples` and `tokens` count what was trained on; tokens include image tokens, not padding. `draws` counts
    every sample taken from the data, including skipped ones, so that an epoch has a fixed number of them; `batches`
    counts every global batch, including skipped ones. A skipped step increases only these two, so that the learning
    rate stays the same (except for a duration in epochs, which counts draws).
    """

    steps: int = 0
    samples: int = 0
    tokens: int = 0
    draws: int = 0
    batches: int = 0

    def learnt(self, *, samples: int, tokens: int, draws: int) -> Consumed:
        """The counts after one more optimizer step on this many samples and tokens."""
        return Consumed(
            self.steps + 1, self.samples + samples, self.tokens + tokens, self.draws + draws, self.batches + 1
        )

    def skipped(self, draws: int) -> Consumed:
        """The counts after a global batch that was skipped."""
        return replace(self, draws=self.draws + draws, batches=self.batches + 1)


@dataclass(frozen=True)
class LearningRate:
    """The factor on every peak learning rate, as a pure function of what a stage has consumed.

    Linear up over the warmup, then cosine (Loshchilov and Hutter 2017, arXiv 1608.03983), linear or constant, down to
    the schedule's floor.

    Args:
        epoch_samples: samples in one epoch of the data.
        global_rows: rows of a global batch, one sample a row: turns a warmup in steps into a share of the duration.
    """

    schedule: Schedule
    duration: Duration
    epoch_samples: int
    global_rows: int

    def at(self, consumed: Consumed) -> float:
        """The factor in [0, 1] on the next step."""
        progress, warmup = self.progress(consumed), self.warmup_share
        if progress < warmup:
            return progress / warmup
        remaining = (1.0 - progress) / (1.0 - warmup)
        match self.schedule.kind:
            case "cosine":
                shape = 0.5 * (1.0 - math.cos(math.pi * remaining))
            case "linear":
                shape = remaining
            case "constant":
                return 1.0
        return self.schedule.floor + (1.0 - self.schedule.floor) * shape

    def progress(self, consumed: Consumed) -> float:
        """The share of the duration that is used up, in [0, 1]."""
        match self.duration.unit:
            case "steps":
                used, total = consumed.steps, self.duration.count
            case "samples":
                used, total = consumed.samples, self.duration.count
            case "tokens":
                used, total = consumed.tokens, self.duration.count
            case "epochs":
                used, total = consumed.draws, self.duration.count * self.epoch_samples
        return min(1.0, used / total)

    @cached_property
    def warmup_share(self) -> float:
        """The share of the duration that the warmup takes.

        A warmup in steps needs a duration that can be counted in steps. Where that counts samples or epochs, one sample
        a row is assumed, so packing, which puts several into a row, shortens the warmup's share.

        Raises:
            InputError: a warmup in steps and a duration in tokens.
        """
        if self.schedule.warmup_steps is None:
            return self.schedule.warmup
        match self.duration.unit:
            case "steps":
                num_steps = float(self.duration.count)
            case "samples":
                num_steps = self.duration.count / self.global_rows
            case "epochs":
                num_steps = self.duration.count * self.epoch_samples / self.global_rows
            case "tokens":
                raise InputError(
                    "schedule.warmup_steps: the duration is in tokens; give schedule.warmup as a share instead"
                )
        return min(0.999, self.schedule.warmup_steps / max(1.0, num_steps))
