"""Whether everything that is to learn does: a tensor that gets no gradient is a fault of the recipe or of ours."""

from __future__ import annotations

import torch

from models.errors import InputError
from trainer.stage import Stage

FIRST_STEP, LATER_STEP = 0, 2
"""Steps behind us when it is looked. LoRA's A has gradient 0 while B is 0, which it is until a step was taken at a
learning rate above 0: not the first one, where the rate is warming up from 0."""


def check_gradients(stage: Stage, *, has_pictures: bool) -> None:
    """After the last backward of a step: raise InputError on every rank that names tensors without any gradient.

    Vision and projector are let off where the global batch has no picture.
    """
    if stage.consumed.steps not in {FIRST_STEP, LATER_STEP}:
        return
    names = [name for group in stage.groups for name in group.names]
    largest = dict.fromkeys(names, 0.0)
    for name, piece in stage.engine.gradients():
        if piece.numel():
            largest[name] = float(torch.linalg.vector_norm(piece, ord=torch.inf))
    found = dict(zip(names, stage.ranks.sum([largest[name] for name in names]), strict=True))
    silent = [name for name in names if found[name] == 0.0]
    if not has_pictures:
        silent = [name for name in silent if name.startswith("language.")]
    if stage.consumed.steps == FIRST_STEP:
        silent = [name for name in silent if ".lora_A." not in name]
    if silent:
        more = f" and {len(silent) - 5} more" if len(silent) > 5 else ""
        raise InputError(
            f"step {stage.consumed.steps + 1}: {', '.join(silent[:5])}{more} got no gradient and would never learn; "
            f"freeze the part (tune), or look at why the loss does not depend on it"
        )
