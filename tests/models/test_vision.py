"""Vision encoders: their features are transformers' own hidden states, frozen or learning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from models.config import TransformersVision
from models.spec import CropImage
from models.vision import FAMILIES, image_spec, load_vision

SHAPE = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}


def make(folder: Path, kind: str) -> Any:
    """A random encoder of a family, saved as it lies on the hub; the model in transformers' own class."""
    import transformers
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    model_class = getattr(transformers, FAMILIES[kind].class_name)
    inner = {"mlp_ratio": 2} if kind == "dinov2" else {"intermediate_size": 48}
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**SHAPE, **inner)).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", ["clip", "dinov2", "siglip", "vit"])
def test_features_are_transformers_hidden_states(tmp_path: Path, kind: str) -> None:
    """After any layer, with CLS and without, also where the encoder learns; as many as the data pipeline counts."""
    model = make(tmp_path, kind)
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        states = model(pixels, output_hidden_states=True).hidden_states
    assert len(states) == 4
    for layer in (-1, -2, 1):
        for keep_cls in (False, True):
            config = TransformersVision(kind=kind, path=str(tmp_path), feature_layer=layer, keep_cls=keep_cls)  # type: ignore[arg-type]
            encoder = load_vision(config, torch.float32)
            expected = states[layer] if keep_cls else states[layer][:, FAMILIES[kind].num_leading_tokens :]
            encoder.requires_grad_(False)
            torch.testing.assert_close(encoder(pixels), expected, rtol=1e-5, atol=1e-6)
            assert image_spec(config, CropImage()).num_features == expected.shape[1]
            encoder.requires_grad_(True)
            learning = encoder(pixels)
            torch.testing.assert_close(learning, expected, rtol=1e-5, atol=1e-6)
            assert learning.requires_grad
