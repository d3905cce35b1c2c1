"""Checks that all trained parameters get gradients: one without is a mistake in the recipe or a bug."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from models.common.errors import InputError
from trainer.callbacks.callback import Callback, TrainingLoop
from trainer.distributed.context import DistributedContext
from trainer.step import GlobalBatch, StepResult

logger = logging.getLogger(__name__)

FIRST_STEP, LATER_STEP = 0, 2
"""Steps taken before the check. The gradient of one half of an adapter is 0 while the other half is, which it is until
a step was taken at a learning rate above 0: not the first one, where the rate is warming up from 0."""

WAITS_FOR_ITS_OTHER_HALF = (".lora_A.", ".lora_embedding_B.")
"""Of a linear layer's adapter B starts at 0, of an embedding's A (peft, `tuners/lora/layer.py`)."""

NEEDS_IMAGES = ("vision.", "projector.")


class UnusedParameterCheck(Callback):
    """Looks at the gradients of the first and the third step, and of the first batch with an image.

    Costs nothing afterwards but a comparison of each part's gradient norm with 0, which the step has computed.
    """

    def __init__(self) -> None:
        self._awaits_images = False

    def on_start(self, loop: TrainingLoop) -> None:
        """A start that goes on does not look again."""
        self._awaits_images = loop.run.state.consumed.steps == 0

    def before_update(self, loop: TrainingLoop, batch: GlobalBatch) -> None:
        """Raises InputError on every rank, naming tensors without any gradient."""
        engine, num_steps = loop.run.services.engine, loop.run.state.consumed.steps
        has_images = batch.totals.num_images > 0
        names = [name for group in engine.groups for name in group.names]
        if num_steps not in {FIRST_STEP, LATER_STEP}:
            if not (has_images and self._awaits_images):
                return
            names = [name for name in names if name.startswith(NEEDS_IMAGES)]
        if has_images:
            self._awaits_images = False
        elif loop.run.context.ranks.is_first:
            _warn_of_blind_parts(names, num_steps)
        ranks = loop.run.context.ranks
        check_unused_parameters(names, engine.gradients(), ranks, num_steps=num_steps, has_images=has_images)

    def after_batch(self, loop: TrainingLoop, batch: GlobalBatch, result: StepResult) -> None:
        """Remember which parts have had a gradient."""
        if result.is_step:
            groups = loop.run.services.engine.groups
            pairs = zip(groups, result.totals.squared_norms, strict=True)
            loop.run.state.reached |= {group.part for group, square in pairs if square > 0.0}

    def before_finish(self, loop: TrainingLoop) -> None:
        """Raises InputError on every rank where a part that was to learn is as it was."""
        state, parts = loop.run.state, {group.part for group in loop.run.services.engine.groups}
        missed = sorted(parts - state.reached)
        if missed and state.consumed.steps > 0:
            raise InputError(
                f"{loop.run.context.title}: {' and '.join(missed)} had no gradient in {state.consumed.steps} steps and"
                " learnt nothing: freeze the part (tune), or look at whether the samples have images"
            )


def _warn_of_blind_parts(names: Sequence[str], num_steps: int) -> None:
    blind = sorted({name.partition(".")[0] for name in names if name.startswith(NEEDS_IMAGES)})
    if blind:
        logger.warning(
            f"step {num_steps + 1}: no sample of the batch has an image, so {' and '.join(blind)} learn nothing from it"
        )


def check_unused_parameters(
    names: Sequence[str],
    gradients: Iterable[tuple[str, Tensor]],
    ranks: DistributedContext,
    *,
    num_steps: int,
    has_images: bool,
) -> None:
    """Raise InputError on every rank where a parameter of `names` got no gradient on any rank.

    Args:
        gradients: this rank's slices, flat, with the names of their parameters; a slice may be empty.
        num_steps: steps taken before this one; before the first, one half of each adapter is not checked.
        has_images: whether the global batch has an image; vision and projector are not checked where it has none.
    """
    largest = dict.fromkeys(names, 0.0)
    for name, piece in gradients:
        if piece.numel():
            largest[name] = float(torch.linalg.vector_norm(piece, ord=torch.inf))
    found = dict(zip(names, ranks.sum([largest[name] for name in names]), strict=True))
    unused = [name for name in names if found[name] == 0.0]
    if not has_images:
        unused = [name for name in unused if not name.startswith(NEEDS_IMAGES)]
    if num_steps == FIRST_STEP:
        unused = [name for name in unused if not any(half in name for half in WAITS_FOR_ITS_OTHER_HALF)]
    if unused:
        more = f" and {len(unused) - 5} more" if len(unused) > 5 else ""
        raise InputError(
            f"step {num_steps + 1}: {', '.join(unused[:5])}{more} got no gradient and would never learn; "
            f"freeze the part (tune), or look at why the loss does not depend on it"
        )
