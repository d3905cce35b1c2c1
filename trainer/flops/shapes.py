"""The shapes of a model's matrices, combined from the shape that each part gives. No weight is read."""

from __future__ import annotations

from models.common.errors import InputError
from models.common.source import FindPart, read_part
from models.config import ModelSource
from models.shapes import ModelShape


def model_shape(model: ModelSource, find: FindPart = read_part) -> ModelShape:
    """The shapes of `model`; `find` gives the config.json of a pretrained part, by default from its directory.

    Raises:
        InputError: a part that is not found, or a config.json that lacks a field.
    """
    try:
        vision, language = model.vision.shape(find), model.language.shape(find)
        features = vision.num_patches + (vision.num_leading_tokens if model.vision.keep_cls else 0)
        return ModelShape(
            vision=vision,
            projector=model.projector.shape(vision.width, language.width, features, find),
            language=language,
            features_per_tile=model.projector.num_tokens(features),
            mtp=model.future.shape(language) if model.future is not None else None,
            pairs=model.projector.pair_shape(vision.width, features, find),
        )
    except KeyError as error:
        raise InputError(f"a config.json lacks {error.args[0]!r}: is it that of a model of this kind?") from None
