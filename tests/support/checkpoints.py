"""Checkpoints without a training run: random trained weights for a stage, written as the trainer writes them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.build import build_vlm, read_metadata
from models.common.files import write_json
from trainer.checkpoint.format import Fragment, name_of
from trainer.checkpoint.initial_weights import base_digests
from trainer.checkpoint.manager import CheckpointManager
from trainer.config.recipe import Recipe
from trainer.distributed.context import DistributedContext
from trainer.engine.tuning import apply_plan


def write_checkpoint(
    root: Path, step: int, *, fragments: Iterable[Fragment], inherited: dict[str, Tensor], state: dict[str, Any]
) -> Path:
    """A checkpoint as one rank that holds everything writes it; OSError where it could not be written."""
    saver = CheckpointManager(root, DistributedContext(), keep=1000, token="test")
    saver.begin(step, fragments=fragments, inherited=whole_fragments(inherited), state=state)
    fault = saver.finish()
    saver.close()  # what it removes beside the loop would take the next one's files for left-overs
    if fault:
        raise OSError(fault)
    return root / name_of(step)


def whole_fragments(weights: dict[str, Tensor]) -> list[Fragment]:
    """Whole weights as a checkpoint takes them."""
    return [Fragment(name, tuple(weight.shape), 0, weight, {}) for name, weight in weights.items()]


def write_finished(recipe: dict[str, Any], stage: str, inherited: dict[str, Tensor] | None = None) -> Path:
    """A finished stage whose projector and adapters are random, far from their start; its run directory.

    `inherited` are weights that an earlier stage has trained.
    """
    checked = Recipe.model_validate_json(json.dumps(recipe))
    config = checked.stage(stage)
    facts = read_metadata(checked.model, config.data.max_length)
    vlm = build_vlm(checked.model, facts, frozen_dtype=torch.float32, seed=0)
    groups = apply_plan(vlm, config.tune, seed=0)
    generator = torch.Generator().manual_seed(1)
    fragments = []
    for group in groups:
        for name, parameter in zip(group.names, group.parameters, strict=True):
            value = 0.1 * torch.randn(parameter.shape, generator=generator)
            fragments.append(Fragment(name, tuple(value.shape), 0, value.view(-1), {}))
    directory = Path(checked.run) / stage
    state = {
        "base": base_digests(checked),
        "config": json.loads(config.model_dump_json()),
        "consumed": {"steps": 1, "samples": 1, "tokens": 1, "draws": 1, "batches": 1},
    }
    written = write_checkpoint(
        directory / "checkpoints", 1, fragments=fragments, inherited=inherited or {}, state=state
    )
    write_json(directory / "finished.json", {"checkpoint": written.name, "samples": 1})
    write_json(Path(checked.run) / "recipe.json", json.loads(checked.model_dump_json()))
    return Path(checked.run)
