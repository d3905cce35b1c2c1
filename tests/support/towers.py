"""Tiny random vision encoders beside CLIP and SigLIP, each a directory with its image processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.support.backbones import IMAGE_SIZE, PATCH_SIZE

_SHAPE: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}


def make_dinov3(folder: Path) -> Path:
    """A DINOv3 with four register tokens."""
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    torch.manual_seed(0)
    sides = {"image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE}
    config = DINOv3ViTConfig(**_SHAPE, **sides, num_hidden_layers=2, num_register_tokens=4)
    DINOv3ViTModel(config).save_pretrained(folder)
    return with_processor(folder)


def make_internvit(folder: Path) -> Path:
    """An InternViT with normalised queries and keys."""
    from transformers import InternVLVisionConfig, InternVLVisionModel

    torch.manual_seed(0)
    sides = {"image_size": [IMAGE_SIZE] * 2, "patch_size": [PATCH_SIZE] * 2}
    config = InternVLVisionConfig(**_SHAPE, **sides, num_hidden_layers=3, use_qk_norm=True)
    InternVLVisionModel(config).save_pretrained(folder)
    return with_processor(folder)


def with_processor(folder: Path) -> Path:
    """The directory with a processor that cuts squares of the tower's size."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    crop = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=crop).save_pretrained(folder)
    return folder
