"""Which parts of a recipe this version can build; the others load, round-trip, and are named before anything runs."""

from __future__ import annotations

from models.config import DecoderLanguage, OpenClipVision
from models.errors import InputError
from trainer.objectives import OBJECTIVES
from trainer.recipe import Recipe


def check_built(recipe: Recipe, stage: str) -> None:
    """Raise InputError that names every part of the recipe's model and of the stage that is not built yet."""
    model, config = recipe.model, recipe.stage(stage)
    missing = []
    if isinstance(model.vision, OpenClipVision):
        missing.append("model.vision.kind=open_clip")
    if isinstance(model.language, DecoderLanguage):
        missing.append("model.language.kind=decoder")
    if config.objective.kind not in OBJECTIVES:
        missing.append(f"stages.{stage}.objective.kind={config.objective.kind}")
    if missing:
        raise InputError(f"{recipe.name}: not built yet: {', '.join(missing)}")
