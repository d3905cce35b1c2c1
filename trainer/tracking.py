"""Where a run's numbers go: a JSONL file always, wandb and TensorBoard on request, and one line for the person.

The JSONL file is the truth. On resume it is cut back to the checkpoint's step, so that no step stands in it twice.
"""

from __future__ import annotations

import json
import secrets
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.config import TrackingConfig

Metrics = dict[str, float]


class Tracker:
    """The first rank's log of one stage. `log` is called after each step that is to be logged, never twice for one."""

    def __init__(
        self, directory: Path, config: TrackingConfig, *, title: str, recipe: dict[str, Any], resumed_at: int
    ) -> None:
        self._file = directory / "metrics.jsonl"
        cut_back(self._file, resumed_at)
        self._stream = self._file.open("a", encoding="utf-8")
        self._sinks: list[Callable[[int, Metrics], None]] = []
        self._closers: list[Callable[[], None]] = [self._stream.close]
        if config.wandb is not None:
            self._open_wandb(directory, config, title, recipe)
        if config.tensorboard:
            self._open_tensorboard(directory)

    def _open_wandb(self, directory: Path, config: TrackingConfig, title: str, recipe: dict[str, Any]) -> None:
        import wandb

        assert config.wandb is not None
        run = wandb.init(
            project=config.wandb.project,
            entity=config.wandb.entity,
            mode=config.wandb.mode,
            dir=str(directory),
            name=title,
            id=_run_id(directory),
            resume="allow",
            config=recipe,
        )
        self._sinks.append(lambda step, metrics: run.log(metrics, step=step))
        self._closers.append(run.finish)

    def _open_tensorboard(self, directory: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(directory / "tensorboard"))

        def add(step: int, metrics: Metrics) -> None:
            for name, value in metrics.items():
                writer.add_scalar(name, value, step)

        self._sinks.append(add)
        self._closers.append(writer.close)

    def log(self, step: int, metrics: Metrics) -> None:
        """One line in the JSONL file, and the same numbers to the other sinks."""
        self._stream.write(json.dumps({"step": step, **metrics}) + "\n")
        self._stream.flush()
        for sink in self._sinks:
            sink(step, metrics)

    def close(self) -> None:
        """Flush and close every sink."""
        for closer in self._closers:
            closer()


def cut_back(file: Path, step: int) -> None:
    """Drop the lines of a metrics file beyond `step`, a half-written last line included."""
    if not file.is_file():
        return
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (json.JSONDecodeError, KeyError):
            break
    file.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def _run_id(directory: Path) -> str:
    """One wandb id for all restarts of a stage."""
    file = directory / "wandb_id"
    if not file.is_file():
        file.write_text(secrets.token_hex(4), encoding="utf-8")
    return file.read_text(encoding="utf-8").strip()


class ProgressLine:
    """What a person sees: one line that is rewritten on a terminal, plain lines elsewhere."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._live = sys.stderr.isatty()
        self._started_s = time.monotonic()
        self._started_at: float | None = None

    def show(self, step: int, done: float, metrics: Metrics) -> None:
        """`done` is the share of the stage that is behind us, in [0, 1]."""
        if self._started_at is None:
            self._started_at, self._started_s = done, time.monotonic()
        text = (
            f"{self._title}  step {step}  {100 * done:5.1f} %  loss {metrics['loss']:.4f}"
            f"  lr {metrics['learning_rate']:.2e}  {metrics['samples_per_s']:.1f} samples/s"
            f"  {metrics['tokens_per_s']:,.0f} tokens/s  left {self._left(done)}"
        )
        print(f"\r\x1b[K{text}" if self._live else text, end="" if self._live else "\n", file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the live line."""
        if self._live:
            print(file=sys.stderr)

    def _left(self, done: float) -> str:
        assert self._started_at is not None
        gained = done - self._started_at
        if gained <= 0:
            return "?"
        seconds = int((time.monotonic() - self._started_s) * (1.0 - done) / gained)
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
