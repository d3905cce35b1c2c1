"""A stage's data before it is trained on: are the sources there, does every rank get rows, what do samples look like.

Owns those checks. Samples come from the training pipeline's own encoder (`trainer.held_out`), the page from
`tools.shards.show`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.build import build_plan
from data_pipeline.config import DataConfig, RowPacking
from data_pipeline.index import ShardIndex
from data_pipeline.sample import Encoded
from data_pipeline.source import open_index
from models.build import Facts
from models.errors import InputError
from models.spec import AnyResImage
from tools.preflight.report import Report
from trainer.config import StageConfig
from trainer.flops import Counts
from trainer.held_out import HeldOut
from trainer.recipe import Recipe


@dataclass(frozen=True)
class Lengths:
    """What samples hold: on average, and the longest row that is to be expected."""

    mean: Counts
    longest_tokens: int
    source: str


def open_sources(data: DataConfig, name: str, report: Report) -> list[ShardIndex]:
    """Every source's index, or none of them where one is missing, which is a fault."""
    indexes = []
    for source in data.sources:
        try:
            indexes.append(open_index(source))
        except InputError as error:
            report.fault(f"{name}: {error}")
    return indexes if len(indexes) == len(data.sources) else []


def check_shards(stage: StageConfig, indexes: list[ShardIndex], num_gpus: int, seed: int, report: Report) -> int | None:
    """Whether every slot has a range and every rank rows; the samples of one epoch, or None where there is a fault."""
    rows = stage.batch.global_rows
    if rows < num_gpus:
        report.fault(f"batch.global_rows: {rows} rows for {num_gpus} GPUs: some would have none; raise it")
    per_rank = math.ceil(rows / num_gpus)
    micro_batches = math.ceil(per_rank / stage.batch.micro_rows)
    report.fact(
        f"{rows} rows a step: up to {per_rank} on each of {num_gpus} GPUs,"
        f" micro-batches: {micro_batches} of up to {min(per_rank, stage.batch.micro_rows)}"
    )
    try:
        plan = build_plan(stage.data, indexes, seed, rows)
    except InputError as error:
        report.fault(f"data: {error}")
        return None
    lengths = [plan.slot_length(slot) for slot in range(rows)]
    num_samples = sum(lengths)
    num_shards = sum(len(index.shard_sizes) for index in indexes)
    report.fact(f"{num_samples:,} samples in {num_shards} shards; {min(lengths)} to {max(lengths)} a row and epoch")
    if min(lengths) == 0:
        empty = lengths.count(0)
        report.fault(f"data: {empty} of {rows} rows of the global batch have no sample; lower batch.global_rows")
    return num_samples


def look_at_samples(stage: StageConfig, held_out: HeldOut, facts: Facts, page: Path, report: Report) -> Lengths | None:
    """Encode the samples and write a page of some of them with their masks; what they hold."""
    found, reasons = [], []
    for sample in held_out.encoded(range(held_out.num_samples)):
        if isinstance(sample, Encoded):
            found.append(sample)
        else:
            reasons.append(f"{sample.shard} {sample.key}: {sample.reason}")
    report.fact(f"{len(found)} of {held_out.num_samples} samples encode")
    if len(reasons) > stage.data.bad_share_limit * held_out.num_samples:
        report.fault(f"data: {len(reasons)} of {held_out.num_samples} samples cannot be used, the first: {reasons[0]}")
    _render(held_out, facts, page, report)
    if not found:
        return None
    total = Counts(0, 0, 0, 0, 0)
    for sample in found:
        total += Counts.of_sample(sample.num_tokens, sample.num_targets, len(sample.tiles))
    longest = max(sample.num_tokens for sample in found)
    mean = total.times(1 / len(found))
    report.fact(
        f"a sample has {mean.tokens:.0f} tokens, {mean.targets:.0f} of them learnt, and {mean.tiles:.1f} tiles;"
        f" the longest {longest} (max_length {stage.data.max_length})"
    )
    return Lengths(mean, longest, f"{len(found)} samples")


def _render(held_out: HeldOut, facts: Facts, page: Path, report: Report) -> None:
    from tools.shards.show import write_page

    page.parent.mkdir(parents=True, exist_ok=True)
    shown = write_page(held_out.indexes[0], held_out.encoder, facts.tokenizer, 16, page)
    report.fact(f"{shown} samples with their masks: {page}")


def check_features(held_out: HeldOut, facts: Facts, features_per_tile: int, report: Report) -> None:
    """Image tokens of some samples against the features of their tiles, by arithmetic. AnyRes leaves features out."""
    if isinstance(facts.image.fit, AnyResImage):
        return
    for sample in held_out.encoded(range(min(8, held_out.num_samples))):
        if not isinstance(sample, Encoded):
            continue
        found = int((sample.input_ids == facts.text.image_token_id).sum())
        if found != len(sample.tiles) * features_per_tile:
            report.fault(
                f"{sample.shard} {sample.key}: {found} image tokens, but {len(sample.tiles)} tiles of"
                f" {features_per_tile} features: model.vision and the preprocessor beside it do not fit"
            )
            return
    report.fact(f"image tokens are as many as features: {features_per_tile} a tile")


def check_forward(recipe: Recipe, stage: StageConfig, facts: Facts, held_out: HeldOut, report: Report) -> None:
    """One real forward of a small model over a few samples: image tokens and features must be as many."""
    import torch

    from data_pipeline.batch import collate
    from models.build import build_vlm
    from trainer.objectives import build_objective
    from trainer.step import TrainStep

    few = range(min(4, held_out.num_samples))
    rows = [(sample,) for sample in held_out.encoded(few) if isinstance(sample, Encoded)]
    if not rows:
        return
    vlm = build_vlm(recipe.model, facts, frozen_dtype=torch.float32, seed=0)
    batch = collate(rows, facts.text)
    try:
        with torch.no_grad():
            sums = TrainStep(vlm, build_objective(stage.objective), "fp32").eval()(batch)
    except ValueError as error:
        report.fault(f"model: {error}")
        return
    loss = float(sums.loss_sum) / max(1, batch.num_targets)
    report.fact(f"image tokens fit the features in a real forward of {len(rows)} samples; untrained loss {loss:.3f}")


def row_counts(stage: StageConfig, lengths: Lengths, *, worst: bool) -> Counts:
    """What a micro-batch holds: on average, or at worst, every row as long as the longest sample seen."""
    if isinstance(stage.data.packing, RowPacking):
        row = lengths.mean.times(stage.data.packing.row_tokens / lengths.mean.tokens)
    elif worst:
        row = lengths.mean.times(lengths.longest_tokens / lengths.mean.tokens)
    else:
        row = lengths.mean
    return row.times(stage.batch.micro_rows)
