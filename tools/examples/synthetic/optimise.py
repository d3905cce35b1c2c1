"""The training loop that all backbones of the synthetic world share: AdamW, warmup, cosine, a progress bar.

Does not own a model, a loss or data. It is not part of the training chain (trainer/).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm


@dataclass(frozen=True)
class Schedule:
    """Learning rate: linear to `peak` over `warmup_steps`, then a cosine down to a fiftieth of it."""

    peak: float
    warmup_steps: int = 50

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of step `step` (from 0) of `steps`: a linear warmup, then a cosine."""
        warmup = min(1.0, (step + 1) / self.warmup_steps)
        return self.peak * warmup * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def fit(model: Any, losses: Iterator[Any], steps: int, schedule: Schedule, title: str) -> float:
    """Take `steps` steps, each on the next of `losses` (scalars with a graph).

    Returns the mean loss of the last tenth of the steps. Gradients are clipped to a norm of 1.
    """
    import torch

    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=0.01)
    tail: list[float] = []
    with tqdm(total=steps, desc=title, unit="step") as bar:
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate(step, steps)
            loss = next(losses)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            tail = [*tail, float(loss.detach())][-max(1, steps // 10) :]
            bar.set_postfix(loss=f"{tail[-1]:.3f}", refresh=False)
            bar.update()
    return sum(tail) / len(tail)
