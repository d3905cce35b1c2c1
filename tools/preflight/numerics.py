"""`--numerics`: the first gradient of a stage in its precision beside fp32's, over a few samples, on this machine.

Owns what can be measured here, and which openings are tried where the image stands at the front and the gradient is
lost. The comparison is `trainer.engine.numerics`, which a run makes before its first step as well.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from data_pipeline.config import PlainTemplate, TokenizerTemplate
from data_pipeline.own_template import user_frame
from data_pipeline.sample import Encoded, Row
from data_pipeline.tokens import Tokens
from models.build import ModelMetadata
from models.common.errors import InputError
from models.common.memory import free_bytes
from tools.preflight.geometry import PartCount
from tools.preflight.report import Report, gigabytes
from trainer.checkpoint.initial_weights import finished_checkpoint
from trainer.checkpoint.reader import CheckpointReader
from trainer.config.recipe import Recipe
from trainer.engine.numerics import HEADROOM, MAX_ROWS, compare_gradients, few_rows, image_is_first, one_by_one
from trainer.engine.train_step import TrainingTask, configure_model
from trainer.starting_model import starting_model
from trainer.tracking.numerics import Finding, describe, findings_of, warning
from trainer.validation.held_out import HeldOut
from trainer.validation.validator import undisturbed

if TYPE_CHECKING:
    from trainer.engine.tuning import ParameterGroup

LINE_FEED = "\n"


def check_numerics(
    recipe: Recipe, name: str, facts: ModelMetadata, counts: dict[str, PartCount], report: Report
) -> None:
    """Measure one stage; what cannot be measured on this machine is listed as not checked."""
    stage = recipe.stage(name)
    if stage.engine.precision == "fp32":
        report.fact("numerics: the stage computes in fp32, the reference itself")
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    init = finished_checkpoint(Path(recipe.run), stage.init) if stage.init is not None else None
    reason = _reason_to_skip(recipe, name, counts, device, init)
    if reason:
        report.leave_out(f"{name}: numerics: {reason}")
        return
    started_s = time.monotonic()
    vlm, groups, _ = starting_model(recipe, name, facts, CheckpointReader.open(init) if init is not None else None)
    configure_model(vlm, stage.engine)
    module = TrainingTask(vlm, stage.objective.build(), stage.engine.precision).to(device)
    measured = _Measured(recipe, name, facts, module, groups)
    rows = measured.rows(opening=None)
    if not rows:
        report.leave_out(f"{name}: numerics: no sample encodes")
        return
    findings, is_first = measured.findings(rows), measured.image_is_first(rows)
    report.fact(
        f"numerics: gradient of {len(rows)} samples in {stage.engine.precision} beside fp32, on {device.type}:"
        f" {describe(findings)} ({time.monotonic() - started_s:.1f} s)"
    )
    told = warning(findings, stage.engine.precision, image_is_first=is_first)
    if told:
        report.fact(f"warning: {name}: {told}")
        if is_first:
            _try_openings(measured, report)


def _reason_to_skip(
    recipe: Recipe, name: str, counts: dict[str, PartCount], device: torch.device, init: Path | None
) -> str:
    stage = recipe.stage(name)
    if stage.init is not None and init is None:
        return f"it starts from {stage.init}, which is not trained yet"
    if recipe.model.language.frozen_format != "full":
        return "frozen weights are quantized, and have no fp32 form"
    frozen = sum(part.frozen for part in counts.values())
    trained = sum(part.trained for part in counts.values())
    needed = HEADROOM * (6 * frozen + 12 * trained)  # in half precision and fp32; in fp32, with two gradients
    free = free_bytes(device)
    return f"fp32 takes {gigabytes(needed)} here, and {gigabytes(free)} are free" if needed > free else ""


def _try_openings(measured: _Measured, report: Report) -> None:
    """What other texts in front of the image make of the gradient."""
    for opening in dict.fromkeys(
        (user_frame(Tokens.of(measured.facts.tokenizer, measured.facts.text.image_token)), LINE_FEED)
    ):
        rows = measured.rows(opening) if opening else []
        if rows and not measured.image_is_first(rows):
            report.fact(f"numerics: with data.template.opening: {opening!r}: {describe(measured.findings(rows))}")


@dataclass(frozen=True)
class _Measured:
    """A stage's model, measured over its first samples under one opening or another."""

    recipe: Recipe
    name: str
    facts: ModelMetadata
    module: TrainingTask
    groups: list[ParameterGroup]

    def rows(self, opening: str | None) -> list[Row]:
        """A few samples as rows."""
        data = self.recipe.stage(self.name).data.model_copy(update={"num_workers": 0})
        if opening is not None and isinstance(data.template, PlainTemplate | TokenizerTemplate):
            data = data.model_copy(update={"template": data.template.model_copy(update={"opening": opening})})
        try:
            held_out = HeldOut.open(data, self.facts, 2 * MAX_ROWS)
        except InputError:
            return []  # the check of the data says it
        found = held_out.encoded(range(held_out.num_samples))
        return few_rows([(sample,) for sample in found if isinstance(sample, Encoded)])

    def findings(self, rows: list[Row]) -> dict[str, Finding]:
        """The agreement of the gradients of `rows` with fp32, by part."""
        device, objective = next(self.module.parameters()).device, self.recipe.stage(self.name).objective
        batches = one_by_one(rows, self.facts.text, device, are_compared=objective.compares_rows)
        with undisturbed(self.module, device):
            return findings_of(compare_gradients(self.module, self.groups, batches))

    def image_is_first(self, rows: list[Row]) -> bool:
        """Whether the language model's sequence begins with an image."""
        is_read = self.recipe.stage(self.name).objective.reader == "language"
        return is_read and image_is_first(rows, self.facts.text.image_token_id)
