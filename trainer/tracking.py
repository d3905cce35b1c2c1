"""Where a run's numbers go: JSONL files always, wandb and TensorBoard on request, and one line for the person.

    RUN/STAGE/metrics.jsonl              one line a logged step
    RUN/STAGE/validation.jsonl           one line a validation
    RUN/STAGE/insight/histograms.jsonl   on request

The JSONL files are the truth. On resume they are cut back to the checkpoint's step, so that no step stands in one
twice. What the other sinks must be told for that is `trainer.sinks`'s.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.files import LineFile
from trainer.answers_page import Answered
from trainer.config import TrackingConfig
from trainer.sinks import Histogram, Metrics, Sink, TensorboardSink, WandbSink

if TYPE_CHECKING:
    import torch

    from data_pipeline.batch import Batch

__all__ = ["Metrics", "ProgressLine", "Tracker", "cut_back", "memory_metrics", "num_positions"]


class Tracker:
    """The first rank's log of one stage. Each method is called once for a step at most; steps rise."""

    def __init__(
        self, directory: Path, config: TrackingConfig, *, title: str, recipe: dict[str, Any], resumed_at: int
    ) -> None:
        self._files: dict[str, LineFile] = {}
        for name in ("metrics.jsonl", "validation.jsonl", "insight/histograms.jsonl"):
            cut_back(directory / name, resumed_at)
            self._files[name] = LineFile(directory / name)
        self._is_warned = False
        self._sinks: list[Sink] = []
        if config.wandb is not None:
            self._sinks.append(WandbSink(directory, config.wandb, title, recipe))
        if config.tensorboard:
            self._sinks.append(TensorboardSink(directory, resumed_at))

    def log(self, step: int, metrics: Metrics) -> None:
        """Numbers of training."""
        self._files["metrics.jsonl"].write({"step": step, **metrics})
        self._tell(lambda sink: sink.log(step, metrics, "metrics"))

    def log_validation(self, step: int, metrics: Metrics, answers: Sequence[Answered] = ()) -> None:
        """Numbers of a validation, and the pictures that were answered."""
        self._files["validation.jsonl"].write({"step": step, **metrics})
        self._tell(lambda sink: sink.log(step, metrics, "validation"))
        if answers:
            self._tell(lambda sink: sink.log_answers(step, answers))

    def log_histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        """Histograms by their names."""
        values = {name: histogram.as_dict() for name, histogram in histograms.items()}
        self._files["insight/histograms.jsonl"].write({"step": step, **values})
        self._tell(lambda sink: sink.log_histograms(step, histograms))

    def log_page(self, step: int, name: str, file: Path) -> None:
        """A page that lies in the run's directory."""
        self._tell(lambda sink: sink.log_page(step, name, file))

    def close(self) -> None:
        """Flush and close everything."""
        for file in self._files.values():
            file.close()
        self._tell(lambda sink: sink.close())

    def _tell(self, send: Callable[[Sink], None]) -> None:
        """To every sink; one that the disk fails is a warning, since the JSONL files hold it all."""
        for sink in self._sinks:
            try:
                send(sink)
            except OSError as error:
                if not self._is_warned:
                    print(f"warning: {type(sink).__name__}: {error}; the JSONL files are complete", file=sys.stderr)
                self._is_warned = True


def cut_back(file: Path, step: int) -> None:
    """Drop the lines of a JSONL file beyond `step`, a half-written last line included; complete or as it was."""
    if not file.is_file():
        return
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (json.JSONDecodeError, KeyError):
            break
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    temporary.rename(file)


def num_positions(batches: Sequence[Batch]) -> int:
    """Positions that micro-batches compute, padding included. Padding waste is 1 - tokens / positions."""
    return sum(batch.input_ids_BL.numel() for batch in batches)


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
