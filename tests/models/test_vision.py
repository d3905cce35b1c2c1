"""Vision encoders: their features are transformers' own hidden states, frozen or learning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from models.encoders.pretrained import VISION_CLASSES, TransformersVision
from models.spec import CropImage

SHAPE = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}


def make(folder: Path, kind: str) -> Any:
    """A random encoder of a family, saved as it lies on the hub; the model in transformers' own class."""
    import transformers
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    model_class = getattr(transformers, VISION_CLASSES[kind].class_name)
    inner = {"mlp_ratio": 2} if kind == "dinov2" else {"intermediate_size": 48}
    inner |= {"num_register_tokens": 2} if kind == "dinov3" else {}
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**SHAPE, **inner)).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", ["clip", "dinov2", "siglip", "vit", "dinov3", "internvit"])
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
            encoder = config.load(torch.float32)
            num_leading = {"siglip": 0, "dinov3": 3}.get(kind, 1)
            expected = states[layer] if keep_cls else states[layer][:, num_leading:]
            encoder.requires_grad_(False)
            torch.testing.assert_close(encoder(pixels), expected, rtol=1e-5, atol=1e-6)
            assert config.image_spec(CropImage()).num_features == expected.shape[1]
            encoder.requires_grad_(True)
            learning = encoder(pixels)
            torch.testing.assert_close(learning, expected, rtol=1e-5, atol=1e-6)
            assert learning.requires_grad


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_the_tower_of_a_whole_directory_is_that_of_its_own_class(tmp_path: Path, kind: str) -> None:
    """A whole CLIP or SigLIP has a text tower too, and its configuration a part for each."""
    import transformers
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    torch.manual_seed(0)
    part = {**SHAPE, "intermediate_size": 48}
    text = {**part, "vocab_size": 30, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1}
    config_class = transformers.CLIPConfig if kind == "clip" else transformers.SiglipConfig
    config = config_class(vision_config=part, text_config={**text, "pad_token_id": 1})
    model = transformers.AutoModel.from_config(config).eval()
    model.save_pretrained(tmp_path)
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        states = model.vision_model(pixels, output_hidden_states=True).hidden_states[-2]
        encoder = TransformersVision(kind=kind, path=str(tmp_path)).load(torch.float32)  # type: ignore[arg-type]
        torch.testing.assert_close(encoder.requires_grad_(False)(pixels), states[:, kind == "clip" :])


def test_the_tower_of_a_published_model_is_a_part_as_well(tmp_path: Path) -> None:
    from models.opening import open_model
    from models.published.vision import PublishedVision
    from tests.support.published import make_published

    folder = make_published(tmp_path / "onevision", "llava_onevision")
    tower = open_model(folder, torch.device("cpu")).model.vision_tower
    config = PublishedVision(path=str(folder), feature_layer=-2)
    pixels = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        expected = tower(pixels, output_hidden_states=True).hidden_states[-2]
        torch.testing.assert_close(config.load(torch.float32).requires_grad_(False)(pixels), expected)
    assert config.image_spec(CropImage()).num_features == 16
