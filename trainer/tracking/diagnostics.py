"""Diagnostics on request: histograms layer by layer, and predicted against true tokens.

Owns what is counted and the page. Does not own when (`trainer.callbacks.diagnostics`) nor the loggers
(`trainer.tracking.tracker`).

    RUN/STAGE/insight/histograms.jsonl           counts and edges of every layer
    RUN/STAGE/insight/tokens_step_000500.html    one micro-batch: each true token, green where it was predicted
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.batch import Batch
from models.common.errors import InputError
from models.spec import IGNORE_INDEX
from trainer.distributed.context import DistributedContext
from trainer.engine.train_step import TrainingTask
from trainer.tracking.loggers import Histogram
from trainer.validation.held_out_loss import Evaluating
from trainer.validation.html_report import write_page
from trainer.validation.validator import undisturbed

NUM_BINS = 64
_LAYER = re.compile(r"^(.*?\.\d+)\.")

_STYLE = """
.row { white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.8 ui-monospace, monospace;
       border-top: 1px solid #ccc; padding: .8rem 0; }
.right { background: #bde5c0; } .wrong { background: #f6c9c4; } .context { color: #888; }
.wrong sub { color: #a40000; }
"""


def layer_of(name: str) -> str:
    """The layer that a parameter belongs to: `language.model.layers.3`, or the module that holds it."""
    match = _LAYER.match(name)
    return match[1] if match else name.rpartition(".")[0]


def layer_histograms(
    named: Iterable[tuple[str, Tensor]],
    prefix: str = "",
    ranks: DistributedContext = DistributedContext(),  # noqa: B008 - a value, not a state
) -> dict[str, Histogram]:
    """One histogram of the values of each layer's tensors, named `prefix` + layer, between its own extremes.

    Over the slices of all ranks: every rank must call it with its own slices. A rank may have none of a layer.
    """
    layers: dict[str, list[Tensor]] = {}
    for name, values in named:
        layers.setdefault(prefix + layer_of(name), []).append(values.detach().flatten())
    parts = {name: [values[torch.isfinite(values)].float() for values in tensors] for name, tensors in layers.items()}
    ranges = _merged_ranges(ranks.gather({name: _extremes(tensors) for name, tensors in parts.items()}))
    counted = {name: _counts(tensors, *ranges[name]) for name, tensors in parts.items()}
    missing = {name: sum(map(len, tensors)) - sum(map(len, parts[name])) for name, tensors in layers.items()}
    told = ranks.gather((counted, missing))
    return {
        name: Histogram(
            tuple(sum(column) for column in zip(*(counts[name] for counts, _ in told if name in counts), strict=True)),
            tuple(torch.linspace(low, high, NUM_BINS + 1, dtype=torch.float64).tolist()),
            sum(not_finite.get(name, 0) for _, not_finite in told),
        )
        for name, (low, high) in ranges.items()
    }


def _extremes(tensors: Sequence[Tensor]) -> tuple[float, float]:
    """(inf, -inf) where there is no value."""
    pairs = [(float(values.min()), float(values.max())) for values in tensors if len(values)]
    return min((low for low, _ in pairs), default=math.inf), max((high for _, high in pairs), default=-math.inf)


def _merged_ranges(told: Sequence[dict[str, tuple[float, float]]]) -> dict[str, tuple[float, float]]:
    ranges: dict[str, tuple[float, float]] = {}
    for name in dict.fromkeys(name for extremes in told for name in extremes):
        pairs = [extremes[name] for extremes in told if name in extremes]
        low, high = min(low for low, _ in pairs), max(high for _, high in pairs)
        if low > high:
            low = high = 0.0
        ranges[name] = (low, high) if low < high else (low - 0.5, high + 0.5)
    return ranges


def _counts(tensors: Sequence[Tensor], low: float, high: float) -> list[int]:
    counts = torch.zeros(NUM_BINS, dtype=torch.float64)
    for values in tensors:
        counts += torch.histc(values, bins=NUM_BINS, min=low, max=high).double().cpu()
    return [int(count) for count in counts]


@dataclass(frozen=True)
class TokenTable:
    """A model's predictions at the targets of one micro-batch. B rows, L positions; on the CPU."""

    input_ids_BL: Tensor
    targets_BL: Tensor
    """The id to be predicted at a position, `IGNORE_INDEX` where none is."""
    predictions_BL: Tensor
    """The most likely id at positions with a target, `IGNORE_INDEX` elsewhere."""

    @property
    def accuracy(self) -> float:
        """Share of targets that were predicted right; 0 without targets."""
        supervised_BL = self.targets_BL != IGNORE_INDEX
        right = (self.predictions_BL == self.targets_BL)[supervised_BL]
        return float(right.double().mean()) if right.numel() else 0.0

    def by_position(self) -> list[tuple[int, int]]:
        """(right, all) of the first, second, … target of every answer; an answer is a run of targets in a row."""
        found: list[list[int]] = []
        for targets_L, predictions_L in zip(self.targets_BL.tolist(), self.predictions_BL.tolist(), strict=True):
            place = 0
            for target, prediction in zip(targets_L, predictions_L, strict=True):
                if target == IGNORE_INDEX:
                    place = 0
                    continue
                if place == len(found):
                    found.append([0, 0])
                found[place][0] += int(target == prediction)
                found[place][1] += 1
                place += 1
        return [(right, total) for right, total in found]


def predict(module: TrainingTask, engine: Evaluating, batch: Batch) -> TokenTable:
    """The model's predictions for one micro-batch on its device. Every rank must call it: it goes through the engine.

    The logits are those of the loss: they are captured at the language model's output head, which the loss calls for
    some of the targets at a time.
    """
    caught: list[Tensor] = []
    head = module.vlm.language.get_output_embeddings()
    hook = head.register_forward_hook(lambda _module, _inputs, logits: caught.append(logits.argmax(-1).flatten().cpu()))
    try:
        with undisturbed(module, batch.device):
            engine.evaluate(batch)
    finally:
        hook.remove()
    targets_BL = batch.tokens.targets_BL.cpu()
    supervised_BL = targets_BL != IGNORE_INDEX
    predictions_K = torch.cat(caught) if caught else torch.empty(0, dtype=torch.int64)
    if predictions_K.numel() != int(supervised_BL.sum()):
        raise InputError("tracking.token_table_every_steps: this objective does not predict one token at each target")
    predictions_BL = torch.full_like(targets_BL, IGNORE_INDEX)
    predictions_BL[supervised_BL] = predictions_K
    return TokenTable(batch.tokens.input_ids_BL.cpu(), targets_BL, predictions_BL)


def write_table(file: Path, title: str, table: TokenTable, tokenizer: Any) -> None:
    """The page: accuracy by position, then each row's tokens; a wrong one with the prediction below it."""
    cells = [
        f"<tr><td>{place}</td><td>{100 * right / total:.1f} %</td><td>{total}</td></tr>"
        for place, (right, total) in enumerate(table.by_position(), start=1)
    ]
    rows = "".join(_row(table, number, tokenizer) for number in range(len(table.input_ids_BL)))
    body = (
        f"<p>Token accuracy {100 * table.accuracy:.1f} %. Green was predicted. Red was not:"
        f" below it stands what was.</p>{rows}<h2>Accuracy by position in the answer</h2>"
        f"<table><tr><th>token</th><th>right</th><th>of</th></tr>{''.join(cells)}</table>"
    )
    write_page(file, title, body, _STYLE)


def _row(table: TokenTable, number: int, tokenizer: Any) -> str:
    """A row's tokens without padding; position p predicts the token at p + 1."""
    ids = table.input_ids_BL[number].tolist()
    targets, predictions = table.targets_BL[number].tolist(), table.predictions_BL[number].tolist()
    learnt = [place for place, target in enumerate(targets) if target != IGNORE_INDEX]
    if not learnt:
        return ""
    spans, run_of = [], ""
    for place in range(learnt[-1] + 2):
        target = targets[place - 1] if place else IGNORE_INDEX
        text = _shown(tokenizer, ids[place]) if place < len(ids) else _shown(tokenizer, target)
        if target == IGNORE_INDEX:
            if text != run_of:  # the many tokens of an image are shown as one
                spans.append(f'<span class="context">{text}</span>')
            run_of = text
        elif predictions[place - 1] == target:
            spans.append(f'<span class="right">{text}</span>')
        else:
            spans.append(f'<span class="wrong">{text}<sub>{_shown(tokenizer, predictions[place - 1])}</sub></span>')
    return f'<div class="row">{"".join(spans)}</div>'


def _shown(tokenizer: Any, token: int) -> str:
    text = str(tokenizer.decode([token]))
    begins_word = str(tokenizer.convert_ids_to_tokens(token)).startswith("\u2581")
    text = f" {text}" if begins_word and not text.startswith(" ") else text
    return escape(text if "\ufffd" not in text and text else f"[{token}]").replace("\n", "\\n")


def table_file(directory: Path, step: int) -> Path:
    """The page of a step in a stage's directory."""
    return directory / "insight" / f"tokens_step_{step:06d}.html"
