"""One stage, looked at from all sides: parts and parameters, data, memory, disk, time.

Owns the order of the checks and the verdicts that follow from numbers. The numbers are made in the files beside it.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from models.build import Facts, read_facts
from models.errors import InputError
from tools.preflight.data import (
    Lengths,
    check_features,
    check_forward,
    check_shards,
    look_at_samples,
    open_sources,
    row_counts,
)
from tools.preflight.geometry import PartCount, PartFacts, count_parts, find_part_of, text_facts
from tools.preflight.memory import estimate, read_settings
from tools.preflight.report import Report, gigabytes, millions
from trainer.config import StageConfig
from trainer.flops import Counts, peak_flops
from trainer.held_out import HeldOut
from trainer.image_text import check_pool
from trainer.needs import stage_needs
from trainer.recipe import Recipe
from trainer.shapes import ModelShape, model_shape, tiles_of
from trainer.streams import stream_seed
from trainer.validation import open_measure

SMALL_PARAMETERS = 50_000_000
"""A model below this runs one real forward."""

CHECKPOINT_BYTES = 12
"""For each trained parameter: the weight and two moments in fp32."""


@dataclass(frozen=True)
class Machine:
    """What the job gets, and what is assumed of it."""

    num_gpus: int
    gpu_bytes: float
    device: str
    peak_share: float
    num_samples: int


class StageCheck:
    """The checks of one stage of a recipe."""

    def __init__(self, recipe: Recipe, name: str, machine: Machine, report: Report) -> None:
        self._recipe, self._name, self._machine, self._report = recipe, name, machine, report
        self._stage = recipe.stage(name)

    def run(self) -> None:
        """Every check; faults go into the report."""
        self._report.title(f"stage {self._name}")
        parts = self._find_parts()
        indexes = open_sources(self._stage.data, self._name, self._report)
        num_samples = None
        if indexes:
            seed = stream_seed(self._recipe.seed, self._name, "order")
            num_samples = check_shards(self._stage, indexes, self._machine.num_gpus, seed, self._report)
        if parts is None:
            return
        try:
            vision, language = (part.config for part in parts)
            shape = model_shape(self._recipe.model, vision, language, text_facts(self._recipe.model))
            counts = count_parts(self._recipe.model, vision, language, self._stage.tune)
        except InputError as error:
            self._report.leave_out(f"{self._name}: parameters, memory and hours: {error}")
            return
        self._show_parameters(counts)
        facts = self._facts(parts)
        lengths = None
        if facts is not None and num_samples is not None:
            lengths = self._look_at_data(facts, shape, counts)
        lengths = lengths or assumed_lengths(self._recipe, self._name, shape)
        self._check_memory(shape, counts, lengths)
        self._check_disk(counts)
        self._check_hours(shape, lengths, num_samples)

    def _find_parts(self) -> tuple[PartFacts, PartFacts] | None:
        found = []
        for config in (self._recipe.model.vision, self._recipe.model.language):
            try:
                part = find_part_of(config)
            except InputError as error:
                self._report.fault(str(error))
                continue
            self._report.fact(part.source)
            found.append(part)
        return (found[0], found[1]) if len(found) == 2 else None

    def _show_parameters(self, counts: dict[str, PartCount]) -> None:
        rows = [("part", "frozen", "learns")]
        rows += [(part, millions(count.frozen), millions(count.trained)) for part, count in counts.items()]
        self._report.table(rows)
        trained = sum(count.trained for count in counts.values())
        total = trained + sum(count.frozen for count in counts.values())
        self._report.fact(f"learns: {millions(trained)} of {millions(total)} parameters, {trained / total:.2%}")
        if getattr(self._recipe.model.language, "load", "full") == "nf4":
            stored = total - counts["language"].quantizable // 2
            self._report.fact(
                f"in 4 bits two parameters share an element: {trained / stored:.2%} of {millions(stored)} elements"
            )

    def _facts(self, parts: tuple[PartFacts, PartFacts]) -> Facts | None:
        """Tokenizer and specs, where both parts' files lie here; what validation would read is looked at too."""
        if any(part.directory is None for part in parts):
            self._report.leave_out(f"{self._name}: samples and masks: the parts' files are not on this machine")
            if self._stage.validation is not None:
                open_sources(self._stage.validation.data, f"{self._name}.validation", self._report)
            return None
        try:
            check_pool(self._stage, self._machine.num_gpus, f"stages.{self._name}")
            facts = read_facts(self._recipe.model, self._stage.data.max_length, self._stage.objective.reader)
        except InputError as error:
            self._report.fault(f"{self._name}: {error}")
            return None
        try:
            open_measure(self._recipe, self._name, facts)
        except InputError as error:
            self._report.fault(f"{self._name}.validation: {error}")
        return facts

    def _look_at_data(self, facts: Facts, shape: ModelShape, counts: dict[str, PartCount]) -> Lengths | None:
        """Samples as training would see them; of a small model, a real forward over a few."""
        try:
            inline = self._stage.data.model_copy(update={"num_workers": 0})
            held_out = HeldOut(inline, facts, self._machine.num_samples)
        except InputError as error:
            self._report.fault(f"{self._name}: {error}")
            return None
        page = Path(self._recipe.run) / "preflight" / f"{self._name}.html"
        lengths = look_at_samples(self._stage, held_out, facts, page, self._report)
        check_features(held_out, facts, shape.features_per_tile, self._report)
        if sum(part.frozen + part.trained for part in counts.values()) <= SMALL_PARAMETERS:
            check_forward(self._recipe, self._stage, facts, held_out, self._report)
        return lengths

    def _check_memory(self, shape: ModelShape, counts: dict[str, PartCount], lengths: Lengths) -> None:
        """A table with nothing and with everything computed again, whether the recipe fits, and what would."""
        engine = self._stage.engine
        num_layers = shape.language.num_layers if self._stage.objective.reader == "language" else 0
        asked = num_layers if engine.activation_checkpointing is True else int(engine.activation_checkpointing)
        batch = row_counts(self._stage, lengths, worst=True)
        run = partial(
            estimate,
            shape,
            counts,
            self._stage,
            batch,
            load=getattr(self._recipe.model.language, "load", "full"),
            num_gpus=self._machine.num_gpus,
            settings=read_settings(engine.zero),
        )
        totals = [run(num_recomputed=layers).total for layers in range(num_layers + 1)]
        none, every = run(num_recomputed=0), run(num_recomputed=num_layers)
        self._report.fact(f"memory of a GPU, micro-batch of {batch.tokens:,.0f} tokens ({lengths.source}), computed:")
        columns = {"keep all": none, "recompute all": every} if num_layers else {"": none}
        rows = [("", *columns)]
        rows += [(part, *(gigabytes(each.parts[part]) for each in columns.values())) for part in none.parts]
        self._report.table([*rows, ("together", *(gigabytes(each.total) for each in columns.values()))])
        self._judge_memory(totals, asked)

    def _judge_memory(self, totals: list[float], asked: int) -> None:
        """`totals` are bytes by the number of recomputed layers."""
        has = self._machine.gpu_bytes
        stage, asked = f"stages.{self._name}", min(asked, len(totals) - 1)
        fitting = next((layers for layers, total in enumerate(totals) if total <= has), None)
        if fitting is None:
            self._report.fault(
                f"{self._name}: {gigabytes(min(totals))} at least, a GPU has {gigabytes(has)}: lower"
                f" {stage}.batch.micro_rows, or quantize the frozen language model (model.language.load)"
            )
            return
        if len(totals) == 1:
            return
        advice = "false" if fitting == 0 else str(fitting)
        self._report.fact(
            f"recommended: activation_checkpointing: {advice} (of {len(totals) - 1} layers; the recipe has {asked})"
        )
        if totals[asked] > has:
            self._report.fault(
                f"{self._name}: {gigabytes(totals[asked])}, a GPU has {gigabytes(has)}:"
                f" set {stage}.engine.activation_checkpointing={advice}, or lower {stage}.batch.micro_rows"
            )

    def _check_disk(self, counts: dict[str, PartCount]) -> None:
        """The checkpoints that are kept, the best one and one that is being written, against the free disk."""
        one = CHECKPOINT_BYTES * sum(part.trained for part in counts.values())
        kept = self._stage.checkpoint.keep + 1 + (self._stage.validation is not None)
        place = Path(self._recipe.run).resolve()
        while not place.is_dir():
            place = place.parent
        free = shutil.disk_usage(place).free
        self._report.fact(f"a checkpoint has {gigabytes(one)}, {kept} at once; {gigabytes(free)} are free at {place}")
        if one * kept > free:
            self._report.fault(
                f"{self._name}: {kept} checkpoints of {gigabytes(one)} do not fit into {gigabytes(free)} at {place}:"
                f" free some space, set another `run`, or lower stages.{self._name}.checkpoint.keep"
            )

    def _check_hours(self, shape: ModelShape, lengths: Lengths, num_samples: int | None) -> None:
        """Steps by the duration, hours by needed FLOPs and an assumed share of the peak."""
        steps = num_steps(self._stage, lengths, num_samples)
        peak = peak_flops(self._machine.device)
        if steps is None:
            self._report.leave_out(f"{self._name}: steps and hours: they follow from the data, which are not here")
            return
        if peak is None:
            self._report.fact(f"{steps:,} steps")
            self._report.leave_out(f"{self._name}: hours: the peak of {self._machine.device} is not known here")
            return
        row = row_counts(self._stage, lengths, worst=False).times(1 / self._stage.batch.micro_rows)
        step = row.times(self._stage.batch.global_rows)
        flops = steps * sum(part.total for part in stage_needs(self._stage, shape)(step).values())
        machine = self._machine
        hours = flops / (peak * machine.peak_share * machine.num_gpus) / 3600
        self._report.fact(
            f"{steps:,} steps; {hours:.1f} hours, computed from {flops:.2e} FLOPs at an assumed"
            f" {machine.peak_share:.0%} of {machine.num_gpus} x {peak / 1e12:.0f} TFLOP/s"
        )


def assumed_lengths(recipe: Recipe, name: str, shape: ModelShape) -> Lengths:
    """Without samples: every row as long as may be, half of its text learnt, one picture of most tiles."""
    side = math.isqrt(shape.vision.num_patches) * math.isqrt(shape.vision.patch_inputs // 3)
    tiles, tokens = tiles_of(recipe.model, side), recipe.stage(name).data.max_length
    targets = max(1, (tokens - tiles * shape.features_per_tile) // 2)
    return Lengths(Counts.of_sample(tokens, targets, tiles), tokens, "assumed: every sample of max_length")


def num_steps(stage: StageConfig, lengths: Lengths, num_samples: int | None) -> int | None:
    """Optimizer steps of a stage; None where they follow from data that are not here."""
    duration, rows = stage.duration, stage.batch.global_rows
    row = row_counts(stage, lengths, worst=False).times(1 / stage.batch.micro_rows)
    samples = row.tokens / lengths.mean.tokens
    if duration.unit == "steps":
        return duration.count
    if duration.unit == "samples":
        return math.ceil(duration.count / (rows * samples))
    if duration.unit == "tokens":
        return math.ceil(duration.count / (rows * row.tokens))
    if num_samples is None:
        return None
    return math.ceil(num_samples * duration.count / (rows * samples))
