"""The exported image processor, saved and opened by stock transformers, gives the pixels of training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.images import fit
from models.export import image_processor
from models.spec import CLIP_MEAN, CLIP_STD, CropImage, ImageSpec, PadImage

SIZES = [(61, 40), (40, 61), (48, 48), (211, 97), (97, 212), (5, 300)]


@pytest.mark.parametrize(
    "rule", [CropImage(), PadImage(), PadImage(colour="black")], ids=["crop", "pad with the mean", "pad with black"]
)
def test_pixels_of_any_shape_are_those_of_training(rule: CropImage | PadImage, tmp_path: Path) -> None:
    from transformers import AutoImageProcessor

    spec = ImageSpec(size=48, patch_size=12, fit=rule, mean=CLIP_MEAN, std=CLIP_STD)
    image_processor(spec).save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    generator = np.random.default_rng(0)
    for width, height in SIZES:
        image = Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
        found = processor(image, return_tensors="np")["pixel_values"][0]
        ours = (fit(image, spec).astype(np.float32) / 255 - np.float32(spec.mean)) / np.float32(spec.std)
        assert np.abs(found - ours.transpose(2, 0, 1)).max() < 1e-5, (width, height)
