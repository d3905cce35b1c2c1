"""A model's shape is what its parts say; a config.json that lacks a field is named."""

from __future__ import annotations

from typing import Any

import pytest

from models.common.errors import InputError
from models.common.source import PartFacts
from models.config import ModelConfig
from trainer.flops.shapes import model_shape

VISION: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "image_size": 32,
    "patch_size": 8,
}
LANGUAGE: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
}


def model(**changes: Any) -> ModelConfig:
    return ModelConfig.model_validate(
        {
            "vision": {"kind": "clip", "path": "vision", "keep_cls": True},
            "projector": {"kind": "mlp"},
            "language": {"kind": "pretrained", "path": "language"},
            **changes,
        }
    )


def find(path: str) -> PartFacts:
    return PartFacts({"vision": {"vision_config": VISION}, "language": LANGUAGE}[path], path, None)


def test_the_parts_fit_together() -> None:
    shape = model_shape(model(future={"kind": "sequential"}), find)
    assert (shape.vision.num_patches, shape.vision.num_layers, shape.features_per_tile) == (16, 2, 17)
    assert [(each.inputs, each.outputs) for each in shape.projector.linears] == [(24, 16), (16, 16)]
    assert (shape.language.query_width, shape.language.key_width) == (16, 8)
    assert shape.mtp is not None
    assert (shape.mtp.num_layers, shape.mtp.layer_linears[0].name) == (1, "join")
    assert shape.pairs is None


def test_a_new_decoder_knows_the_tokenizers_tokens_and_the_image_token() -> None:
    decoder = {"kind": "decoder", "tokenizer": "language", "num_layers": 5, "num_heads": 2, "width": 12}
    shape = model_shape(model(language=decoder), find).language
    assert (shape.vocabulary, shape.num_layers, shape.inner, shape.tied) == (51, 5, 32, True)


def test_a_missing_field_is_named() -> None:
    def broken(path: str) -> PartFacts:
        return PartFacts({"hidden_size": 16}, path, None)

    with pytest.raises(InputError, match=r"a config\.json lacks 'num_hidden_layers'"):
        model_shape(model(), broken)
