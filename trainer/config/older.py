"""What earlier versions left out: a key that has come since, whose default today is another than what was done then.

    RUN/recipe.json without the key + today's recipe without it --as_begun--> the recipe, as the run was begun
    a checkpoint's record without the key                    --with_absent--> what its version did, spelled out

Owns only `data.template.opening`: before it, a sample of the template `plain` began with the begin token or the image;
then, for a while, None was the default.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from data_pipeline.config import DataConfig, PlainTemplate
from trainer.config.schema import StageConfig

OPENING_BEFORE = ""


def as_begun(stage: StageConfig, stored: Mapping[str, Any]) -> StageConfig:
    """A stage that leaves its openings to the default, with those of the version that began its run.

    Args:
        stored: the stage in RUN/recipe.json.
    """
    found = stage.model_copy(update={"data": _data_as_begun(stage.data, stored)})
    validation, before = found.validation, stored.get("validation")
    if validation is None or not isinstance(before, Mapping):
        return found
    validation = validation.model_copy(update={"data": _data_as_begun(validation.data, before)})
    return found.model_copy(update={"validation": validation})


def _data_as_begun(data: DataConfig, stored: Mapping[str, Any]) -> DataConfig:
    template, before = data.template, _opening_in(stored)
    if not isinstance(template, PlainTemplate) or template.opening is not True or before is True:
        return data
    return data.model_copy(update={"template": template.model_copy(update={"opening": before})})


def with_absent(stage: Mapping[str, Any]) -> dict[str, Any]:
    """A stage's record in a checkpoint, with the opening that its version had."""
    template = _plain_in(stage)
    if template is None or "opening" in template:
        return dict(stage)
    data = cast(Mapping[str, Any], stage["data"])
    return {**stage, "data": {**data, "template": {**template, "opening": OPENING_BEFORE}}}


def _opening_in(stage: Mapping[str, Any]) -> Any:
    """The default that stored values were begun with; True, today's, also where they have a text of their own."""
    template = _plain_in(stage)
    if template is not None and "opening" not in template:
        return OPENING_BEFORE
    return None if template is not None and template["opening"] is None else True


def _plain_in(stage: Mapping[str, Any]) -> Mapping[str, Any] | None:
    data = stage.get("data")
    template = data.get("template") if isinstance(data, Mapping) else None
    return template if isinstance(template, Mapping) and template.get("kind") == "plain" else None
