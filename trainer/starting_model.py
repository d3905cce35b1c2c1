"""The model that a stage starts from: pretrained parts, new ones, the tuning plan, the weights of the stage before."""

from __future__ import annotations

from models.build import ModelMetadata, build_vlm
from models.vlm import VLM
from trainer.checkpoint.initial_weights import load_weights
from trainer.checkpoint.reader import CheckpointReader
from trainer.config.recipe import Recipe
from trainer.distributed.seeding import derive_seed
from trainer.engine.train_step import DTYPES
from trainer.engine.tuning import ParameterGroup, apply_plan, renew_magnitudes


def starting_model(
    recipe: Recipe, name: str, metadata: ModelMetadata, init: CheckpointReader | None
) -> tuple[VLM, list[ParameterGroup], list[str]]:
    """The model on the CPU, the groups of what learns in it, and the names of the weights taken from `init`.

    The same weights on every rank: new ones are drawn from seeds that follow from the recipe's.

    Args:
        init: the finished checkpoint of the stage that this one starts from, if it starts from one.

    Raises:
        InputError: the plan names a part or a module that the model does not have.
    """
    config = recipe.stage(name)
    vlm = build_vlm(
        recipe.model,
        metadata,
        frozen_dtype=DTYPES[config.engine.precision],
        seed=derive_seed(recipe.seed, "projector"),
    )
    groups = apply_plan(vlm, config.tune, seed=derive_seed(recipe.seed, name, "adapters"))
    loaded = load_weights(vlm, init) if init is not None else []
    renew_magnitudes(vlm, set(loaded))
    return vlm, groups, loaded
