"""Where numbers go besides the JSONL files: Weights & Biases and TensorBoard.

Owns what each of them must be told so that a run that was killed and resumed shows every step once:

    wandb        one run id, kept in RUN/STAGE/wandb.json with the last step that was sent; what was sent stays
    TensorBoard  on resume, readers drop events beyond the checkpoint's step (`purge_step`)
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from models.errors import InputError
from models.files import write_json
from models.source import read_json
from trainer.answers_page import Answered, caption_of, contact_sheet
from trainer.config import WandbConfig

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


class Sink(Protocol):
    """What a run tells one of them; a channel's steps rise."""

    def log(self, step: int, metrics: Metrics, channel: str) -> None:
        """Numbers of a step."""

    def log_answers(self, step: int, answers: Sequence[Answered]) -> None:
        """Pictures with texts."""

    def log_histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        """One histogram a layer."""

    def log_page(self, step: int, name: str, file: Path) -> None:
        """An HTML page."""

    def close(self) -> None:
        """Everything is on its way."""


class WandbSink:
    """Weights & Biases. A step that was sent before a kill is not sent again: wandb keeps what it was told first."""

    def __init__(self, directory: Path, config: WandbConfig, title: str, recipe: dict[str, Any]) -> None:
        import wandb

        self._file = directory / "wandb.json"
        kept = read_json(directory, self._file.name) if self._file.is_file() else {}
        self._id: str = kept.get("id") or secrets.token_hex(4)
        self._sent: dict[str, int] = kept.get("sent", {})
        write_json(self._file, {"id": self._id, "sent": self._sent})
        try:
            self._run = wandb.init(
                project=config.project,
                entity=config.entity,
                mode=config.mode,
                dir=str(directory),
                name=title,
                id=self._id,
                resume="allow",
                config=recipe,
            )
        except wandb.errors.Error as error:
            reason = " ".join(str(error).split())
            raise InputError(f"tracking.wandb: {reason}; log in with `wandb login`, or set mode: offline") from error

    def log(self, step: int, metrics: Metrics, channel: str) -> None:
        """See `Sink`."""
        self._send(step, metrics, channel)

    def log_answers(self, step: int, answers: Sequence[Answered]) -> None:
        """See `Sink`."""
        import wandb

        pictures = [wandb.Image(each.example.picture, caption=caption_of(each)) for each in answers]
        self._send(step, {"validation/answers": pictures}, "answers")

    def log_histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        """See `Sink`."""
        import wandb

        shown = {
            name: wandb.Histogram(np_histogram=(np.asarray(value.counts), np.asarray(value.edges)))
            for name, value in histograms.items()
        }
        self._send(step, shown, "histograms")

    def log_page(self, step: int, name: str, file: Path) -> None:
        """See `Sink`."""
        import wandb

        self._send(step, {name: wandb.Html(file.read_text(encoding="utf-8"))}, name)

    def close(self) -> None:
        """See `Sink`."""
        self._run.finish()

    def _send(self, step: int, values: Mapping[str, Any], channel: str) -> None:
        if step <= self._sent.get(channel, -1):
            return
        self._run.log(dict(values), step=step)
        self._sent[channel] = step
        write_json(self._file, {"id": self._id, "sent": self._sent})


class TensorboardSink:
    """TensorBoard's event files in RUN/STAGE/tensorboard, flushed after every step that is logged."""

    def __init__(self, directory: Path, resumed_at: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory / "tensorboard"), purge_step=resumed_at + 1 if resumed_at else None)

    def log(self, step: int, metrics: Metrics, channel: str) -> None:
        """See `Sink`."""
        del channel
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def log_answers(self, step: int, answers: Sequence[Answered]) -> None:
        """See `Sink`; one picture of all."""
        if answers:
            sheet = np.asarray(contact_sheet(answers))
            self._writer.add_image("validation/answers", sheet, step, dataformats="HWC")
            self._writer.flush()

    def log_histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        """See `Sink`."""
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
        """See `Sink`; TensorBoard shows no pages, so it names the file."""
        self._writer.add_text(name, json.dumps(str(file)), step)

    def close(self) -> None:
        """See `Sink`."""
        self._writer.close()
