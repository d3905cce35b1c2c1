"""Bundles of AnyRes over other encoders than CLIP: stock LLaVA-NeXT with its processor gives training's logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from models.bundle import verify
from models.common.errors import run_cli
from tests.support.backbones import hold_in_bf16, make_language, tiny_recipe
from tests.support.checkpoints import write_finished
from tools.export.merge import main as merge
from tools.export.parity import LOGIT_BOUNDS

SIZE, PATCH = 50, 12  # as SigLIP's 384 and 14: the patches do not fill the square
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def make_encoder(kind: str, folder: Path) -> None:
    import transformers
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    name = {"siglip": "SiglipVision", "vit": "ViT"}[kind]
    size = SIZE if kind == "siglip" else 48  # ViT wants whole patches
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SHAPE, image_size=size, patch_size=PATCH)
    getattr(transformers, f"{name}Model")(config).save_pretrained(folder)
    square = {"height": size, "width": size}
    CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=square).save_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "projector", "precision"),
    [("siglip", "linear", "fp32"), ("vit", "mlp", "fp32"), ("siglip", "mlp", "bf16"), ("vit", "linear", "bf16")],
)
def test_the_bundle_equals_the_trained_model(tmp_path: Path, kind: str, projector: str, precision: str) -> None:
    """In bf16 of a language model in bf16, beside an encoder in fp32."""
    make_encoder(kind, tmp_path / "vision")
    make_language(tmp_path / "language", "qwen2", tied=True)
    if precision == "bf16":
        hold_in_bf16(tmp_path / "language")
    recipe: dict[str, Any] = tiny_recipe(tmp_path, tmp_path / "shards")
    size = SIZE if kind == "siglip" else 48
    recipe["model"] |= {
        "vision": {"kind": kind, "path": str(tmp_path / "vision"), "feature_layer": -1},
        "projector": {"kind": projector},
        "image": {"kind": "anyres", "pinpoints": [[size, 2 * size], [3 * size, size], [2 * size, 2 * size]]},
    }
    recipe["stages"]["lora"]["init"] = None
    recipe["stages"]["lora"]["engine"]["precision"] = precision
    write_finished(recipe, "lora")
    assert run_cli(merge, [recipe["run"], str(tmp_path / "bundle"), "--stage", "lora"]) == 0
    checks = {check.name: check.value for check in verify(tmp_path / "bundle").parity.checks}
    assert checks["prompt ids differ"] == 0.0
    assert checks["largest pixel difference"] == 0.0
    assert checks["largest relative logit difference"] < {"fp32": 1e-5, "bf16": LOGIT_BOUNDS["bf16"]}[precision]
