"""How much of a gradient a precision carries: the gradient of a few rows in it beside that in fp32, row by row.

    a row --module as it trains-----------------------> gradient in bf16 or fp16 --+
      '----weights and buffers as fp32, no autocast---> gradient in fp32 ----------+--> Agreement by part

The gradients are taken by `torch.autograd.grad`, past DeepSpeed: nothing is accumulated, every weight is what it was.
Row by row: where a precision fails, the norms of rows differ by a factor of 100, and the largest would speak for all.
Does not own when this is done, or for which rows (`trainer.callbacks.numerics`, `tools.preflight.numerics`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from data_pipeline.batch import Batch, collate
from data_pipeline.sample import Row
from models.spec import TextSpec
from trainer.distributed.totals import Totals
from trainer.engine.loss_scale import LossScale
from trainer.engine.train_step import TrainingTask
from trainer.engine.tuning import ParameterGroup

MAX_ROWS, MAX_TOKENS = 8, 2048
"""Enough for a steady cosine, few enough to cost a step or two."""

HALF = (torch.bfloat16, torch.float16)
HEADROOM = 1.25
"""Free memory for an fp32 gradient, as a multiple of its weights and gradients: activations of a few rows."""


@dataclass(frozen=True)
class Agreement(Totals):
    """Of one part's gradients of some rows, in a stage's precision and in fp32. Those of several ranks can be added."""

    cosine_sum: float = 0.0
    num_rows: float = 0.0
    """Those from which a gradient reaches the part."""
    square_sum: float = 0.0
    """Of norms, in the stage's precision; rows with a gradient that is not finite count nothing."""
    square_sum_fp32: float = 0.0

    @classmethod
    def of_row(cls, product: float, square: float, square_fp32: float) -> Agreement:
        """One row's, from the scalar product of its gradients and their squared norms."""
        if square_fp32 == 0.0:
            return cls()
        if not math.isfinite(square) or square == 0.0:
            return cls(0.0, 1.0, 0.0, square_fp32)
        return cls(product / math.sqrt(square) / math.sqrt(square_fp32), 1.0, square, square_fp32)

    def __add__(self, other: Agreement) -> Agreement:
        """That of the rows of both."""
        return Agreement(*map(sum, zip(self.pack(), other.pack(), strict=True)))

    @property
    def cosine(self) -> float:
        """The mean over the rows; a gradient that is 0 or not finite in the stage's precision counts as 0."""
        return self.cosine_sum / self.num_rows

    @property
    def norm_ratio(self) -> float:
        """The norm in the stage's precision over that in fp32, of all rows together."""
        return math.sqrt(self.square_sum / self.square_sum_fp32)


def compare_gradients(
    module: TrainingTask,
    groups: Sequence[ParameterGroup],
    batches: Iterable[Batch],
    agree: Callable[[bool], bool] = lambda is_needed: is_needed,
) -> dict[str, Agreement]:
    """Gradients in the module's precision beside those in fp32, by part of the model; each batch counts as a row.

    The module must hold whole weights, in evaluation mode, so that dropout makes no difference.

    Args:
        groups: the parameters that learn, by part.
        batches: one row each; all rows in one, for an objective that compares them.
        agree: whether any rank needs a gradient again at a smaller loss scale: where the rows of all ranks are
            compared, each must compute equally often.
    """
    found = {group.part: Agreement() for group in groups}
    scale = LossScale(module.precision)
    with torch.compiler.set_stance("force_eager"):  # what is compiled for training is compiled in training
        for batch in batches:
            gradients = _scaled_gradients(module, groups, batch, scale, agree)
            with _as_fp32(module):
                gradients_fp32 = _gradients(module, groups, batch)
            for part, pieces in gradients.items():
                found[part] += Agreement.of_row(*_products(pieces, gradients_fp32[part]))
    return found


def _scaled_gradients(
    module: TrainingTask,
    groups: Sequence[ParameterGroup],
    batch: Batch,
    scale: LossScale,
    agree: Callable[[bool], bool],
) -> dict[str, list[Tensor]]:
    """Gradients at a loss scale at which they are finite, found as training finds it; divided by it again."""
    while True:
        gradients = _gradients(module, groups, batch, scale.value)
        is_finite = all(bool(torch.isfinite(each).all()) for pieces in gradients.values() for each in pieces)
        if not agree(not is_finite) or not scale.halve():
            return gradients


def _gradients(
    module: TrainingTask, groups: Sequence[ParameterGroup], batch: Batch, scale: float = 1.0
) -> dict[str, list[Tensor]]:
    """By part, d loss / d parameter of the mean loss over the targets; zeros where the loss does not depend on it."""
    parameters = [parameter for group in groups for parameter in group.parameters]
    loss = module(batch).loss_sum * (scale / max(1, batch.num_targets))
    gradients = iter(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))
    found: dict[str, list[Tensor]] = {}
    for group in groups:
        found.setdefault(group.part, []).extend(next(gradients) / scale for _ in group.parameters)
    return found


def _products(pieces: Sequence[Tensor], pieces_fp32: Sequence[Tensor]) -> tuple[float, float, float]:
    """The scalar product of two gradients in pieces, and both squared norms."""
    product = square = square_fp32 = 0.0
    for piece, piece_fp32 in zip(pieces, pieces_fp32, strict=True):
        flat, flat_fp32 = piece.flatten().double(), piece_fp32.flatten().double()
        product += float(torch.dot(flat, flat_fp32))
        square += float(torch.dot(flat, flat))
        square_fp32 += float(torch.dot(flat_fp32, flat_fp32))
    return product, square, square_fp32


@contextmanager
def _as_fp32(module: TrainingTask) -> Iterator[None]:
    """Inside, frozen weights are fp32 copies and nothing is computed under autocast."""
    replaced = [(tensor, tensor.data) for tensor in _halves(module)]
    precision, module.precision = module.precision, "fp32"
    try:
        for tensor, data in replaced:
            tensor.data = data.float()
        yield
    finally:
        module.precision = precision
        for tensor, data in replaced:
            tensor.data = data


def _halves(module: nn.Module) -> list[Tensor]:
    return [each for each in (*module.parameters(), *module.buffers()) if each.dtype in HALF]


def needed_bytes(module: nn.Module, groups: Sequence[ParameterGroup], numel: Callable[[Tensor], int]) -> int:
    """Memory that `compare_gradients` takes beside the module: fp32 copies of what is in half precision, two gradients.

    Args:
        numel: elements of a whole parameter, which ZeRO-3 keeps in slices.
    """
    copies = sum(4 * numel(each) for each in _halves(module))
    learning = sum(numel(parameter) for group in groups for parameter in group.parameters)
    return int(HEADROOM * (copies + 8 * learning))


def is_quantized(module: nn.Module) -> bool:
    """Whether some weights are integers, so that no other precision can be computed with them."""
    return any(not each.dtype.is_floating_point for each in module.parameters())


def image_is_first(rows: Sequence[Row], image_token_id: int) -> bool:
    """Whether a sample begins with its image."""
    return any(int(sample.input_ids[0]) == image_token_id for row in rows for sample in row)


def one_by_one(rows: Sequence[Row], text: TextSpec, device: torch.device, *, are_compared: bool) -> Iterator[Batch]:
    """A batch for each row; one for all of them where the objective compares them."""
    for part in [rows] if are_compared else [[row] for row in rows]:
        yield collate(part, text).to(device)


def few_rows(rows: Sequence[Row]) -> list[Row]:
    """Up to `MAX_ROWS` rows and `MAX_TOKENS` tokens, one at least, those with images first."""
    found: list[Row] = []
    num_tokens = 0
    for row in sorted(rows, key=lambda row: not any(len(sample.tiles) for sample in row)):
        num_tokens += sum(sample.num_tokens for sample in row)
        if found and (len(found) == MAX_ROWS or num_tokens > MAX_TOKENS):
            break
        found.append(row)
    return found
