"""The learning rate as a pure function of how far a stage has come; nothing here has a memory."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from models.errors import InputError
from trainer.config import Duration, Schedule


@dataclass(frozen=True)
class Consumed:
    """What a stage has used up so far, over all ranks.

    `steps`, `samples` and `tokens` count what was learnt from; tokens with image tokens and without padding. `draws`
    counts every sample taken from the data, those that were passed over too, so that an epoch has a fixed number of
    them; `batches` every global batch, skipped ones too. After a skipped step only these two have grown, so that the
    learning rate is what it was (where the duration is in epochs, the data that was passed is still behind it).
    """

    steps: int = 0
    samples: int = 0
    tokens: int = 0
    draws: int = 0
    batches: int = 0

    def learnt(self, *, samples: int, tokens: int, draws: int) -> Consumed:
        """The state after one more optimizer step on so many samples and tokens."""
        return Consumed(
            self.steps + 1, self.samples + samples, self.tokens + tokens, self.draws + draws, self.batches + 1
        )

    def skipped(self, draws: int) -> Consumed:
        """The state after a global batch that nothing was learnt from."""
        return replace(self, draws=self.draws + draws, batches=self.batches + 1)


def progress(duration: Duration, consumed: Consumed, epoch_samples: int) -> float:
    """The share of the duration that is used up, in [0, 1]; `epoch_samples` is the size of one epoch."""
    match duration.unit:
        case "steps":
            used, total = consumed.steps, duration.count
        case "samples":
            used, total = consumed.samples, duration.count
        case "tokens":
            used, total = consumed.tokens, duration.count
        case "epochs":
            used, total = consumed.draws, duration.count * epoch_samples
    return min(1.0, used / total)


def warmup_share(schedule: Schedule, duration: Duration, *, epoch_samples: int, rows: int) -> float:
    """The share of the duration that the warmup takes; a warmup in steps needs a duration that can be put in steps.

    One sample a row is assumed where the duration counts samples or epochs; packing shortens the warmup's share.
    """
    if schedule.warmup_steps is None:
        return schedule.warmup
    match duration.unit:
        case "steps":
            total_steps = float(duration.count)
        case "samples":
            total_steps = duration.count / rows
        case "epochs":
            total_steps = duration.count * epoch_samples / rows
        case "tokens":
            raise InputError(
                "schedule.warmup_steps: the duration is in tokens; give schedule.warmup as a share instead"
            )
    return min(0.999, schedule.warmup_steps / max(1.0, total_steps))


def multiplier(schedule: Schedule, warmup: float, progress_now: float) -> float:
    """The factor on the peak learning rate at `progress_now` in [0, 1]; `warmup` is the warmup's share of the whole.

    Linear up over the warmup, then cosine (Loshchilov and Hutter 2017), linear or constant, down to `floor`.
    """
    if progress_now < warmup:
        return progress_now / warmup
    remaining = (1.0 - progress_now) / (1.0 - warmup)
    match schedule.kind:
        case "cosine":
            shape = 0.5 * (1.0 - math.cos(math.pi * remaining))
        case "linear":
            shape = remaining
        case "constant":
            return 1.0
    return schedule.floor + (1.0 - schedule.floor) * shape
