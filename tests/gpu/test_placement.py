"""Bases on devices: read onto one and quantized there, and of several none ever holds the whole base under ZeRO-3."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from models.languages.pretrained import PretrainedLanguage
from models.placement import Placement, placing
from tests.support.backbones import make_clip, make_language, tiny_recipe
from tests.support.ranks import run_on_ranks
from tests.support.shards import write_set
from trainer.config.recipe import Recipe
from trainer.distributed.context import DistributedContext


@pytest.mark.parametrize(("load", "share"), [("full", 1.2), ("nf4", 0.6), ("int8", 0.85)])
def test_a_base_is_read_to_the_device_and_quantized_there(tmp_path: Path, load: Any, share: float) -> None:
    """The peak is beside the size in 16 bits; embedding, head and the tensor at hand stay in these."""
    if load != "full":
        pytest.importorskip("bitsandbytes")
    config = PretrainedLanguage(path=str(make_language(tmp_path, width=512, num_layers=8)), load=load)
    size = 2 * sum(
        each.numel() for each in PretrainedLanguage(path=str(tmp_path)).load_model(torch.float32).parameters()
    )
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with placing(Placement(torch.device("cuda"))):
        model = config.load_model(torch.float16)
    assert {each.device.type for each in (*model.parameters(), *model.buffers())} == {"cuda"}
    assert torch.cuda.max_memory_allocated() - before < share * size
    assert model(input_ids=torch.arange(5, device="cuda").unsqueeze(0)).logits.isfinite().all()


def peaks(ranks: DistributedContext, recipe: dict[str, Any]) -> tuple[int, int]:
    """Bytes of a stage's base, and the most that this rank's device held while the stage was built."""
    from trainer.build import build_stage

    opened = build_stage(Recipe.model_validate_json(json.dumps(recipe)), "align", ranks)
    try:
        vlm: Any = opened.services.engine.module.vlm
        size = sum(4 * each.ds_numel for part in (vlm.vision, vlm.language) for each in part.parameters())
        return size, torch.cuda.max_memory_allocated()
    finally:
        opened.close()


@pytest.mark.multi
@pytest.mark.parametrize(("zero", "share"), [("zero3", 0.8), ("zero3_offload", 0.3)])
def test_no_device_ever_holds_the_whole_base(tmp_path: Path, zero: str, share: float) -> None:
    make_clip(tmp_path / "vision")
    make_language(tmp_path / "language", width=512, num_layers=8)
    write_set(tmp_path / "shards", [5, 1, 9])
    recipe = tiny_recipe(tmp_path, tmp_path / "shards", align={"engine": {"zero": zero, "precision": "fp32"}})
    for size, peak in run_on_ranks(2, peaks, recipe):
        assert peak < share * size
