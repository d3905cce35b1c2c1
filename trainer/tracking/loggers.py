"""What a run tells the places where its numbers go besides the JSONL files, and one of them: TensorBoard.

Each of them must show every step of a run that was killed and started again once: TensorBoard's readers are told to
drop all events beyond the step that a start begins from (`purge_step`), 0 too. Weights & Biases is in
`trainer.tracking.wandb_logger`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from trainer.validation.answers_page import Answered, contact_sheet

Metrics = dict[str, float]


@dataclass(frozen=True)
class Histogram:
    """`counts[i]` values lie in [edges[i], edges[i + 1]); values that are not finite are counted apart."""

    counts: tuple[int, ...]
    edges: tuple[float, ...]
    num_not_finite: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"counts": self.counts, "edges": self.edges, "num_not_finite": self.num_not_finite}


class MetricsLogger(Protocol):
    """The interface of a logger; steps of a channel increase."""

    def log(self, step: int, metrics: Metrics, channel: str) -> None:
        """Numbers of a step."""

    def log_answers(self, step: int, answers: Sequence[Answered]) -> None:
        """Images with texts."""

    def log_histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        """One histogram a layer."""

    def log_page(self, step: int, name: str, file: Path) -> None:
        """An HTML page."""

    def close(self) -> None:
        """Send everything that is pending, and close."""


class TensorboardLogger:
    """TensorBoard's event files in RUN/STAGE/tensorboard, flushed after every step that is logged."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    @classmethod
    def open(cls, directory: Path, resumed_at: int) -> TensorboardLogger:
        """Write into RUN/STAGE/tensorboard; readers drop events after step `resumed_at` (`purge_step`)."""
        from torch.utils.tensorboard import SummaryWriter

        return cls(SummaryWriter(str(directory / "tensorboard"), purge_step=resumed_at + 1))

    def log(self, step: int, metrics: Metrics, channel: str) -> None:
        """See `MetricsLogger`."""
        del channel
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def log_answers(self, step: int, answers: Sequence[Answered]) -> None:
        """All answers as one image."""
        if answers:
            sheet = np.asarray(contact_sheet(answers))
            self._writer.add_image("validation/answers", sheet, step, dataformats="HWC")
            self._writer.flush()

    def log_histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        """See `MetricsLogger`."""
        for name, value in histograms.items():
            counts, edges = np.asarray(value.counts, dtype=np.float64), np.asarray(value.edges)
            middles = (edges[:-1] + edges[1:]) / 2
            self._writer.add_histogram_raw(
                name,
                min=float(edges[0]),
                max=float(edges[-1]),
                num=int(counts.sum()),
                sum=float(counts @ middles),
                sum_squares=float(counts @ middles**2),
                bucket_limits=edges[1:].tolist(),
                bucket_counts=counts.tolist(),
                global_step=step,
            )
        self._writer.flush()

    def log_page(self, step: int, name: str, file: Path) -> None:
        """TensorBoard shows no pages, so it names the file."""
        self._writer.add_text(name, json.dumps(str(file)), step)

    def close(self) -> None:
        """See `MetricsLogger`."""
        self._writer.close()
