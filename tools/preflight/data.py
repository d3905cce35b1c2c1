"""A stage's data before it is trained on: the sources exist, every rank gets rows, and a page shows samples.

Owns those checks. Samples come from the training pipeline's own encoder (`trainer.validation.held_out`), the page from
`tools.shards.show`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from data_pipeline.build import build_plan
from data_pipeline.config import DataConfig, RowPacking
from data_pipeline.index import ShardIndex
from data_pipeline.sample import Encoded
from data_pipeline.source import open_index
from data_pipeline.unused import remarks
from models.build import ModelMetadata
from models.common.errors import InputError
from models.shapes import Counts
from tools.preflight.report import Report
from trainer.config.recipe import Recipe
from trainer.config.schema import StageConfig
from trainer.config.tuning import Frozen
from trainer.validation.held_out import HeldOut


@dataclass(frozen=True)
class Lengths:
    """Counts of samples: on average, and of the longest expected row."""

    mean: Counts
    longest_tokens: int
    source: str


def open_sources(data: DataConfig, name: str, report: Report) -> list[ShardIndex]:
    """Every source's index, or none if one is missing, which is recorded as a fault."""
    indexes = []
    for source in data.sources:
        try:
            indexes.append(open_index(source))
            for remark in remarks(indexes[-1]):
                report.fact(f"{name}: {remark}")
        except InputError as error:
            report.fault(f"{name}: {error}")
    return indexes if len(indexes) == len(data.sources) else []


def check_shards(stage: StageConfig, indexes: list[ShardIndex], num_gpus: int, seed: int, report: Report) -> int | None:
    """Check that every slot has samples and every rank rows; returns the samples of one epoch, None after a fault."""
    rows = stage.batch.global_rows
    if rows < num_gpus:
        report.fault(f"batch.global_rows: {rows} rows for {num_gpus} GPUs: some would have none; raise it")
    report.fact(
        f"{rows} rows a step: up to {stage.batch.rank_rows(num_gpus)} on each of {num_gpus} GPUs, micro-batches:"
        f" {stage.batch.num_micro_batches(num_gpus)} of up to {stage.batch.rows_at_once(num_gpus)}"
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


def look_at_samples(
    stage: StageConfig, held_out: HeldOut, facts: ModelMetadata, page: Path, report: Report
) -> Lengths | None:
    """Encode the samples and write a page of some of them with their masks; returns their counts."""
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
        of_text = Counts.of_sample(sample.num_tokens, sample.num_targets, len(sample.tiles))
        image_pairs, window_pairs = sample.patch_pairs
        total += replace(of_text, image_pairs=image_pairs, window_pairs=window_pairs)
    blind = [part for part in ("vision", "projector") if not isinstance(getattr(stage.tune, part), Frozen)]
    if blind and not any(len(sample.tiles) for sample in found):
        report.fault(
            f"data: none of {len(found)} samples has an image, so {' and '.join(blind)} would learn nothing; freeze"
            " them (tune), or look at the sources"
        )
    longest = max(sample.num_tokens for sample in found)
    mean = total.times(1 / len(found))
    report.fact(
        f"a sample has {mean.tokens:.0f} tokens, {mean.targets:.0f} of them learnt, and {mean.tiles:.1f} tiles;"
        f" the longest {longest} (max_length {stage.data.max_length})"
    )
    return Lengths(mean, longest, f"{len(found)} samples")


def _render(held_out: HeldOut, facts: ModelMetadata, page: Path, report: Report) -> None:
    from tools.shards.show import render_tokens, write_page

    page.parent.mkdir(parents=True, exist_ok=True)
    shown = write_page(held_out.indexes[0], render_tokens(held_out.encoder, facts.tokenizer), 16, page)
    report.fact(f"{shown} samples with their masks: {page}")


def check_features(held_out: HeldOut, facts: ModelMetadata, features_per_tile: int, report: Report) -> None:
    """Compare image tokens with their tiles' features, by arithmetic; says so where a sample has an image."""
    has_compared = False
    for sample in held_out.encoded(range(min(8, held_out.num_samples))):
        if not isinstance(sample, Encoded) or not len(sample.tiles):
            continue
        has_compared = True
        found = int((sample.input_ids == facts.text.image_token_id).sum())
        if found != len(sample.tiles) * features_per_tile:
            report.fault(
                f"{sample.shard} {sample.key}: {found} image tokens, but {len(sample.tiles)} tiles of"
                f" {features_per_tile} features: model.vision and the preprocessor beside it do not fit"
            )
            return
    if has_compared:
        report.fact(f"image tokens are as many as features: {features_per_tile} a tile")


def check_forward(recipe: Recipe, stage: StageConfig, facts: ModelMetadata, held_out: HeldOut, report: Report) -> None:
    """One real forward of a small model over a few samples: image tokens and features must be as many."""
    import torch

    from data_pipeline.batch import collate
    from models.build import build_vlm
    from trainer.engine.train_step import TrainingTask

    few = range(min(4, held_out.num_samples))
    rows = [(sample,) for sample in held_out.encoded(few) if isinstance(sample, Encoded)]
    if not rows:
        return
    vlm = build_vlm(recipe.model, facts, frozen_dtype=torch.float32, seed=0)
    batch = collate(rows, facts.text)
    try:
        with torch.no_grad():
            sums = TrainingTask(vlm, stage.objective.build(), "fp32").eval()(batch)
    except ValueError as error:
        report.fault(f"model: {error}")
        return
    loss = float(sums.loss_sum) / max(1, batch.num_targets)
    report.fact(f"image tokens fit the features in a real forward of {len(rows)} samples; untrained loss {loss:.3f}")


def row_counts(stage: StageConfig, lengths: Lengths, *, worst: bool) -> Counts:
    """Counts of a row: on average, or at worst as long as the longest sample seen."""
    if isinstance(stage.data.packing, RowPacking):
        return lengths.mean.times(stage.data.packing.row_tokens / lengths.mean.tokens)
    return lengths.mean.times(lengths.longest_tokens / lengths.mean.tokens) if worst else lengths.mean
