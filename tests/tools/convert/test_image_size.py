"""An encoder with its positions interpolated once computes what it computed interpolating them in each forward."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from models.common.errors import InputError, run_cli
from models.encoders.pretrained import VISION_CLASSES, TransformersVision, processor_size
from tools.convert.__main__ import main
from tools.convert.image_size import resized

SHAPE: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}


def encoder(kind: str, size: int) -> Any:
    torch.manual_seed(0)
    model_class = getattr(transformers, VISION_CLASSES[kind].class_name)
    model = model_class(model_class.config_class(**SHAPE, image_size=size))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 8)
    return model.eval()


@pytest.mark.parametrize("kind", sorted(VISION_CLASSES))
def test_positions_are_interpolated_as_transformers_does(kind: str) -> None:
    model = encoder(kind, 48)
    other = resized(model, 24)
    assert other.config.image_size in (24, [24, 24], (24, 24))
    pixels = torch.randn(2, 3, 24, 24)
    takes = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
    flag = {"interpolate_pos_encoding": True} if takes else {}
    with torch.no_grad():
        expected = model(pixels, **flag).last_hidden_state
        found = other(pixels).last_hidden_state
    assert torch.equal(found, expected)


def test_a_size_that_patches_do_not_divide_is_refused() -> None:
    with pytest.raises(InputError, match="--image-size 30: no multiple of the encoder's patches of 8 pixels"):
        resized(encoder("vit", 48), 30)


def written(folder: Path, *, size: int, processed: dict[str, Any]) -> TransformersVision:
    encoder("dinov2", size).save_pretrained(folder)
    values = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, **processed}
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    return TransformersVision(kind="dinov2", path=str(folder))


def test_a_directory_for_another_size_is_made_by_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As DINOv2's on the hub: config.json says one size, the preprocessor another one."""
    crop = {"crop_size": {"height": 24, "width": 24}, "do_center_crop": True, "size": {"shortest_edge": 32}}
    vision = written(tmp_path / "hub", size=48, processed=crop)
    doubt = vision.size_doubt()
    assert doubt is not None
    assert "config.json says 48 pixels, preprocessor_config.json says 24" in doubt
    assert vision.model_copy(update={"image_size": 48}).size_doubt() is None  # said so
    with pytest.raises(InputError, match=r"image_size: 24, but .*config\.json says 48; make a directory"):
        vision.model_copy(update={"image_size": 24}).shape()
    command = doubt.partition("sightline convert ")[2].replace("OUT", str(tmp_path / "out")).split()
    assert run_cli(main, command) == 0
    other = vision.model_copy(update={"path": str(tmp_path / "out"), "image_size": 24})
    assert other.size_doubt() is None
    assert other.shape().num_patches == 9
    assert other.normalisation() == ([0.5] * 3, [0.5] * 3)
    assert run_cli(main, command) == 2
    assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "size"),
    [
        ({"size": 224, "crop_size": 224}, 224),
        ({"size": 384}, 384),
        ({"size": {"height": 384, "width": 384}}, 384),
        ({"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}, 224),
        ({"size": {"shortest_edge": 256}, "crop_size": 224, "do_center_crop": False}, None),
        ({}, None),
    ],
)
def test_the_processors_size_is_that_of_its_squares(values: dict[str, Any], size: int | None) -> None:
    assert processor_size(values) == size
