"""A run's logs: JSONL files always, wandb and TensorBoard on request, and a progress line on the console.

    RUN/STAGE/metrics.jsonl              one line a logged step
    RUN/STAGE/validation.jsonl           one line a validation
    RUN/STAGE/insight/histograms.jsonl   on request

The JSONL files are the reference. On resume they are truncated to the checkpoint's step, so that no step appears twice.
The first line of a start in metrics.jsonl has its device under `on`.
`trainer.tracking.loggers` does the same for the other loggers.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from typing_extensions import TypedDict

from models.common.documents import check, parse
from models.common.errors import InputError, single_line
from models.common.files import LineFile, split_lines, write_text
from trainer.config.schema import TrackingConfig
from trainer.tracking.loggers import Histogram, Metrics, MetricsLogger, TensorboardLogger
from trainer.tracking.wandb_logger import WandbLogger
from trainer.validation.answers_page import Answered

if TYPE_CHECKING:
    import torch

    from data_pipeline.batch import Batch

__all__ = ["Metrics", "ProgressLine", "Tracker", "cut_back", "memory_metrics", "num_positions"]

logger = logging.getLogger(__name__)


FILES = ("metrics.jsonl", "validation.jsonl", "insight/histograms.jsonl")


class Tracker:
    """The first rank's log of one stage. Each method is called at most once per step; steps increase."""

    def __init__(
        self, directory: Path, loggers: Sequence[MetricsLogger], device: Mapping[str, Any] = MappingProxyType({})
    ) -> None:
        self._of_start: dict[str, Any] = {"on": dict(device)} if device else {}
        """For the first line only."""
        self._files = {name: LineFile(directory / name) for name in FILES}
        self._loggers = loggers
        self._is_warned = False

    @classmethod
    def open(
        cls,
        directory: Path,
        config: TrackingConfig,
        *,
        title: str,
        recipe: dict[str, Any],
        resumed_at: int,
        device: Mapping[str, Any] = MappingProxyType({}),
    ) -> Tracker:
        """The log of a start that resumes after step `resumed_at`: later lines are dropped.

        Args:
            directory: RUN/STAGE.
            title: the run's name in wandb.
            recipe: the resolved recipe, which wandb stores with the run.
            device: what this start computes with; stands in its first line of metrics.jsonl.

        Raises:
            InputError: the login to wandb fails.
        """
        for name in FILES:
            cut_back(directory / name, resumed_at)
        loggers: list[MetricsLogger] = []
        if config.wandb is not None:
            loggers.append(WandbLogger.open(directory, config.wandb, title, recipe, resumed_at))
        if config.tensorboard:
            loggers.append(TensorboardLogger.open(directory, resumed_at))
        return cls(directory, loggers, device)

    def log(self, step: int, metrics: Metrics) -> None:
        """Log training metrics of a step."""
        self._files["metrics.jsonl"].write({"step": step, **metrics, **self._of_start})
        self._of_start = {}
        self._tell(lambda each: each.log(step, metrics, "metrics"))

    def log_validation(self, step: int, metrics: Metrics, answers: Sequence[Answered] = ()) -> None:
        """Log metrics of a validation, and the images that were answered."""
        self._files["validation.jsonl"].write({"step": step, **metrics})
        self._tell(lambda each: each.log(step, metrics, "validation"))
        if answers:
            self._tell(lambda each: each.log_answers(step, answers))

    def log_histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        """Log histograms by name."""
        values = {name: histogram.as_dict() for name, histogram in histograms.items()}
        self._files["insight/histograms.jsonl"].write({"step": step, **values})
        self._tell(lambda each: each.log_histograms(step, histograms))

    def log_page(self, step: int, name: str, file: Path) -> None:
        """Log an HTML page in the run's directory."""
        self._tell(lambda each: each.log_page(step, name, file))

    def close(self) -> None:
        """Flush and close everything."""
        for file in self._files.values():
            file.close()
        self._tell(lambda each: each.close())

    def _tell(self, send: Callable[[MetricsLogger], None]) -> None:
        """Call every logger; a failure is only a warning, since the JSONL files hold everything."""
        for each in self._loggers:
            try:
                send(each)
            except Exception as error:  # whatever it is: a copy that fails must not end the run
                if not self._is_warned:
                    logger.warning(f"{type(each).__name__}: {single_line(error)}; the JSONL files are complete")
                self._is_warned = True


class _Line(TypedDict):
    step: int


def cut_back(file: Path, step: int) -> None:
    """Drop the lines of a JSONL file beyond `step`, a half-written last line included; atomic."""
    if not file.is_file():
        return
    kept = []
    for line in split_lines(file.read_text(encoding="utf-8")):
        try:
            if check(parse(line, file), _Line, file)["step"] <= step:
                kept.append(line)
        except InputError:
            break
    write_text(file, "".join(line + "\n" for line in kept))


def num_positions(batches: Sequence[Batch]) -> int:
    """Positions that micro-batches compute, padding included. Padding waste is 1 - tokens / positions."""
    return sum(batch.num_positions for batch in batches)


def memory_metrics(device: torch.device) -> Metrics:
    """This process's memory in GB (1e9 bytes): resident now, and on a GPU the peak since the last call."""
    import torch

    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    metrics = {"memory/rss_gb": pages * os.sysconf("SC_PAGE_SIZE") / 1e9}
    if device.type == "cuda":
        metrics["memory/gpu_peak_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
        metrics["memory/gpu_reserved_gb"] = torch.cuda.memory_reserved(device) / 1e9
        torch.cuda.reset_peak_memory_stats(device)
    return metrics


class ProgressLine:
    """The progress display: one line that is rewritten on a terminal, plain lines elsewhere."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._live = sys.stderr.isatty()
        self._started_s = time.monotonic()
        self._started_at: float | None = None

    def show(self, step: int, done: float, metrics: Metrics) -> None:
        """`done` is the share of the stage that is completed, in [0, 1]."""
        if self._started_at is None:
            self._started_at, self._started_s = done, time.monotonic()
        text = (
            f"{self._title}  step {step}  {100 * done:5.1f} %  loss {metrics['loss']:.4f}"
            f"  lr {metrics['learning_rate']:.2e}  {metrics['samples_per_s']:.1f} samples/s"
            f"  {metrics['tokens_per_s']:,.0f} tokens/s  left {self._left(done)}"
        )
        if self._live:  # a line longer than the terminal would wrap, and could not be rewritten
            text = f"\r\x1b[K{text[: shutil.get_terminal_size().columns - 1]}"
        print(text, end="" if self._live else "\n", file=sys.stderr, flush=True)

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
