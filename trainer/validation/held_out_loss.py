"""The loss on held-out samples, summed over ranks, and retrieval where the objective compares images and texts."""

from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from PIL import Image

from data_pipeline.batch import Batch, collate
from data_pipeline.sample import BadSample, Encoded
from models.common.errors import AwayError, InputError
from models.common.files import LineFile
from trainer.distributed.context import DistributedContext
from trainer.distributed.totals import Totals
from trainer.objectives.loss_sum import Embeddings, LossSum
from trainer.validation.agreement import ShouldStop, agree
from trainer.validation.measure import GRID_PAIRS, Measure
from trainer.validation.retrieval import draw_grid, measure

logger = logging.getLogger(__name__)


class Evaluating(Protocol):
    """The part of the engine that measuring a loss needs."""

    def evaluate(self, batch: Batch) -> LossSum:
        """The sums of one micro-batch, without a gradient and without dropout."""


@dataclass(frozen=True)
class HeldOutTotals(Totals):
    """Sums over the held-out samples of all ranks; the loss in nats over all targets."""

    loss_sum: float
    num_correct: float
    num_targets: float
    num_samples: float
    num_unusable: float


class _Compared(NamedTuple):
    """A batch of pairs: their keys, what tells their images and their texts apart, and their embeddings."""

    keys: list[str]
    images: list[bytes]
    texts: list[bytes]
    embeddings: Embeddings

    @classmethod
    def of(cls, rows: Sequence[tuple[Encoded, ...]], embeddings: Embeddings) -> _Compared:
        """The pairs of `rows`; the pixels and the tokens that the model is given tell images and texts apart."""
        pairs = [sample for row in rows for sample in row]
        return cls(
            [sample.key for sample in pairs],
            [hashlib.sha256(sample.tiles.tobytes()).digest() for sample in pairs],
            [hashlib.sha256(sample.input_ids.tobytes()).digest() for sample in pairs],
            Embeddings(*(value.float().cpu() for value in embeddings)),
        )


class HeldOutLoss:
    """Measures loss and token accuracy, or retrieval, on a stage's held-out samples."""

    def __init__(
        self,
        measure: Measure,
        engine: Evaluating,
        ranks: DistributedContext,
        device: torch.device,
        unusable: LineFile,
    ) -> None:
        self.grid: Image.Image | None = None
        """The similarities of the first pairs, where the objective compares images and texts."""
        self._measure, self._engine, self._ranks, self._device = measure, engine, ranks, device
        self._unusable = unusable
        self._named: set[tuple[str, str]] = set()

    def run(self, should_stop: ShouldStop) -> dict[str, float]:
        """The metrics over all targets of the held-out samples. Every rank runs as many batches.

        Raises:
            InputError: on every rank, where no sample can be used.
            Interrupted: on every rank, if one was asked to stop.
        """
        plan = self._measure
        share = self._ranks.local_rows(plan.held_out.num_samples)
        samples = plan.held_out.encoded(share)
        compared: list[_Compared] = []
        sums, num_samples = torch.zeros(3, dtype=torch.float64), 0
        for start in self._batches():
            rows = self._rows(samples, min(plan.micro_rows, len(share) - start), should_stop)
            batch = collate([*rows, *[()] * (plan.micro_rows - len(rows))], plan.text)
            found = self._engine.evaluate(batch.to(self._device))
            local = (found.loss_sum, found.num_correct, batch.num_targets)
            sums += torch.tensor([float(value) for value in local], dtype=torch.float64)
            num_samples += len(rows)
            if found.embeddings is not None:
                compared.append(_Compared.of(rows, found.embeddings))
        loss_sum, num_correct, num_targets = sums.tolist()
        num_unusable = len(share) - num_samples
        totals = HeldOutTotals(loss_sum, num_correct, num_targets, num_samples, num_unusable).summed(self._ranks)
        if totals.num_targets == 0:
            raise InputError("validation.data: no sample of it can be used; see validation/unusable.jsonl")
        measured = {"validation/loss": totals.loss_sum / totals.num_targets}
        if plan.is_compared:
            measured |= self._retrieval(compared)
        else:
            measured["validation/token_accuracy"] = totals.num_correct / totals.num_targets
        counts = {"validation/samples": totals.num_samples, "validation/unusable_samples": totals.num_unusable}
        return {**measured, **counts}

    def _batches(self) -> Iterator[int]:
        """The starts of the micro-batches of the rank with the most samples, with a progress bar on a terminal."""
        from tqdm import tqdm

        world_size, num_samples = self._ranks.world_size, self._measure.held_out.num_samples
        longest = max(len(DistributedContext(rank, world_size).local_rows(num_samples)) for rank in range(world_size))
        is_shown = self._ranks.is_first and sys.stderr.isatty()
        starts = range(0, longest, self._measure.micro_rows)
        yield from tqdm(starts, desc="validation", unit="batch", leave=False, disable=not is_shown)

    def _rows(
        self, samples: Iterator[Encoded | BadSample], count: int, should_stop: ShouldStop
    ) -> list[tuple[Encoded, ...]]:
        """The usable ones among the next `count` samples, each a row; raises on every rank if any rank has to raise."""
        rows: list[tuple[Encoded, ...]] = []
        fault, is_away = "", False
        try:
            for _ in range(count):
                sample = next(samples)
                if isinstance(sample, Encoded):
                    rows.append((sample,))
                else:
                    self._name_unusable(sample)
        except InputError as error:
            fault = str(error)
        except AwayError as error:  # the next start validates again
            logger.warning(f"validation: {error}")
            is_away = True
        agree(self._ranks, lambda: is_away or should_stop(), fault)
        return rows

    def _name_unusable(self, sample: BadSample) -> None:
        if sample.kind == "too_long" and self._measure.held_out.too_long_is_error:
            raise InputError(f"validation.data: {sample.shard} {sample.key}: {sample.reason}")
        if (sample.shard, sample.key) not in self._named:
            self._named.add((sample.shard, sample.key))
            self._unusable.write({"shard": sample.shard, "key": sample.key, "reason": sample.reason})

    def _retrieval(self, found: list[_Compared]) -> dict[str, float]:
        """Recall over the pairs of all ranks, and the contrastive loss over them at once; none without embeddings."""
        everything = [part for share in self._ranks.gather(found) for part in share]
        if not everything:
            return {}
        keys = [key for part in everything for key in part.keys]
        images_NQE = torch.cat([part.embeddings.images_NQE for part in everything])
        texts_NE = torch.cat([part.embeddings.texts_NE for part in everything])
        metrics, scores_NN = measure(
            Embeddings(images_NQE, texts_NE, everything[0].embeddings.scale),
            images=[image for part in everything for image in part.images],
            texts=[text for part in everything for text in part.texts],
        )
        shown = [key for key in keys if key in self._measure.compared][:GRID_PAIRS]
        examples, places = [self._measure.compared[key] for key in shown], [keys.index(key) for key in shown]
        images_shown, texts_shown = [each.image for each in examples], [each.reference for each in examples]
        self.grid = draw_grid(images_shown, texts_shown, scores_NN[places][:, places]) if shown else None
        return {f"validation/{name}": value for name, value in metrics.items()}
