"""All checks of one stage: parts and parameters, data, memory, disk, time.

Owns the order of the checks and the judgement of their numbers, which the neighbouring modules compute.
"""

from __future__ import annotations

import math
from pathlib import Path

from models.build import ModelMetadata, check_tiles, read_metadata
from models.common.errors import InputError
from models.common.source import PartFacts
from models.shapes import ModelShape
from tools.preflight.data import (
    Lengths,
    check_features,
    check_forward,
    check_shards,
    look_at_samples,
    open_sources,
)
from tools.preflight.fit import StageFit
from tools.preflight.geometry import PartCount, count_parts, find_part
from tools.preflight.hours import assumed_lengths, check_hours
from tools.preflight.machine import Machine
from tools.preflight.numerics import check_numerics
from tools.preflight.report import Report, millions
from trainer.config.recipe import Recipe
from trainer.distributed.seeding import derive_seed
from trainer.flops.shapes import model_shape
from trainer.inputs import check_compile, check_kept_features
from trainer.objectives.gather import check_rows_at_once
from trainer.validation.held_out import HeldOut
from trainer.validation.measure import open_measure

SMALL_PARAMETERS = 50_000_000
"""Below this many parameters one real forward is run."""


class StageCheck:
    """The checks of one stage of a recipe."""

    def __init__(self, recipe: Recipe, name: str, machine: Machine, report: Report) -> None:
        self._recipe = recipe.model_copy(update={"model": recipe.model.found_by(find_part)})
        self._name, self._machine, self._report = name, machine, report
        self._stage = recipe.stage(name)

    def run(self) -> None:
        """Run every check in order; findings go into the report."""
        self._report.title(f"stage {self._name}")
        self._check_engine()
        parts = self._find_parts()
        indexes = open_sources(self._stage.data, self._name, self._report)
        num_samples = None
        if indexes:
            seed = derive_seed(self._recipe.seed, self._name, "order")
            num_samples = check_shards(self._stage, indexes, self._machine.num_gpus, seed, self._report)
        if parts is None:
            return
        counts = self._count_parts()
        facts = self._facts(parts)
        try:
            shape = model_shape(self._recipe.model, find_part)
        except InputError as error:
            self._report.leave_out(f"{self._name}: memory and hours: {error}")
            return
        if counts is None:
            return
        lengths = None
        if facts is not None and num_samples is not None:
            lengths = self._look_at_data(facts, shape, counts)
        if self._machine.with_numerics:
            self._check_numerics(facts, counts)
        lengths = lengths or assumed_lengths(self._recipe, self._name, shape)
        given = (self._recipe, self._name, self._machine, self._report)
        fit = StageFit(*given)
        fit.check_memory(shape, counts, lengths)
        fit.check_disk(counts)
        moved = fit.step_traffic(counts)
        check_hours(*given, shape=shape, lengths=lengths, num_samples=num_samples, step_traffic=moved)

    def _check_engine(self) -> None:
        try:
            check_compile(self._stage, f"stages.{self._name}.engine")
        except InputError as error:
            self._report.fault(str(error))

    def _find_parts(self) -> tuple[PartFacts, PartFacts] | None:
        found, faults = [], []
        for name in ("vision", "language"):
            try:
                config = getattr(self._recipe.model, name)  # of a published model read from its files here
                part = config.facts(find_part)
                config.check_weights(find_part)
            except InputError as error:
                faults.append(str(error))
                continue
            self._report.fact(part.source)
            found.append(part)
        for fault in dict.fromkeys(faults):  # both parts of one model that is not there have the same
            self._report.fault(fault)
        return (found[0], found[1]) if len(found) == 2 else None

    def _count_parts(self) -> dict[str, PartCount] | None:
        """Parameters by part; None where parts, or the names that the plan tunes them by, do not fit: a fault."""
        model = self._recipe.model
        try:
            shape = model.vision.shape(find_part)
            check_tiles(model, math.isqrt(shape.num_patches) * shape.patch_size)
            model.projector.num_tokens(shape.num_patches + model.vision.num_extra_tokens)
            counts = count_parts(model, self._stage.tune)
            doubt = model.vision.size_doubt(find_part)
        except KeyError as error:
            self._report.fault(f"{self._name}: a config.json lacks {error}: is it that of a model of this kind?")
            return None
        except InputError as error:
            self._report.fault(f"{self._name}: {error}")
            return None
        if doubt is not None:
            self._report.fault(doubt)
        self._show_parameters(counts)
        return counts

    def _show_parameters(self, counts: dict[str, PartCount]) -> None:
        rows = [("part", "frozen", "learns")]
        rows += [(part, millions(count.frozen), millions(count.trained)) for part, count in counts.items()]
        self._report.table(rows)
        trained = sum(count.trained for count in counts.values())
        total = trained + sum(count.frozen for count in counts.values())
        self._report.fact(f"learns: {millions(trained)} of {millions(total)} parameters, {trained / total:.2%}")
        if self._recipe.model.language.frozen_format == "nf4":
            stored = total - counts["language"].quantizable // 2
            self._report.fact(
                f"in 4 bits two parameters share an element: {trained / stored:.2%} of {millions(stored)} elements"
            )

    def _facts(self, parts: tuple[PartFacts, PartFacts]) -> ModelMetadata | None:
        """Tokenizer and specs, if both parts' files are on this machine; validation's inputs are checked too."""
        if any(part.directory is None for part in parts):
            self._report.leave_out(f"{self._name}: samples, masks, weights: the parts' files are not on this machine")
            if self._stage.validation is not None:
                open_sources(self._stage.validation.data, f"{self._name}.validation", self._report)
            return None
        try:
            check_rows_at_once(self._stage, self._machine.num_gpus, f"stages.{self._name}")
            check_kept_features(self._recipe, self._name)
            facts = read_metadata(self._recipe.model, self._stage.data.max_length, self._stage.objective.reader)
        except InputError as error:
            self._report.fault(f"{self._name}: {error}")
            return None
        try:
            open_measure(self._recipe, self._name, facts)
        except InputError as error:
            self._report.fault(f"{self._name}.validation: {error}")
        return facts

    def _look_at_data(self, facts: ModelMetadata, shape: ModelShape, counts: dict[str, PartCount]) -> Lengths | None:
        """Samples as training would see them; of a small model, a real forward over a few."""
        try:
            inline = self._stage.data.model_copy(update={"num_workers": 0})
            held_out = HeldOut.open(inline, facts, self._machine.num_samples)
        except InputError as error:
            self._report.fault(f"{self._name}: {error}")
            return None
        page = Path(self._recipe.run) / "preflight" / f"{self._name}.html"
        lengths = look_at_samples(self._stage, held_out, facts, page, self._report)
        # AnyRes drops padding, and images of native resolution have any number: only a forward tells.
        is_tiled = facts.image.fit.is_tiled or facts.image.fit.grid is not None
        if not is_tiled:
            check_features(held_out, facts, shape.features_per_tile, self._report)
        if sum(part.frozen + part.trained for part in counts.values()) <= SMALL_PARAMETERS:
            check_forward(self._recipe, self._stage, facts, held_out, self._report)
        elif is_tiled:
            limit = millions(SMALL_PARAMETERS)
            self._report.leave_out(
                f"{self._name}: image tokens against features: a forward, made up to {limit} parameters"
            )
        return lengths

    def _check_numerics(self, facts: ModelMetadata | None, counts: dict[str, PartCount]) -> None:
        if facts is None:
            self._report.leave_out(f"{self._name}: numerics: the parts' files are not on this machine, or do not fit")
        else:
            check_numerics(self._recipe, self._name, facts, counts, self._report)
