"""A real pretrained language model inside a VLM says what it always said where no image is given, bundled or not."""

from __future__ import annotations

from pathlib import Path

import torch

from eval.live import LiveModel
from models.build import build_vlm, read_metadata
from tests.support.backbones import tiny_recipe
from tests.support.checkpoints import write_finished
from tests.support.paths import data, needs_data
from tools.examples.synthetic.llama2c import import_llama2c
from tools.export.merge import main as merge_main
from trainer.config.recipe import Recipe

NUM_NEW_TOKENS = 200


@needs_data
@torch.no_grad()
def test_stories260k_tells_its_story_before_and_after_merge_and_bundle(tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    source = data("weights", "stories260K")
    reference = (source / "expected_greedy_200steps.txt").read_text(encoding="utf-8").rstrip("\n")
    recipe = tiny_recipe(tmp_path, tmp_path / "shards")
    import_llama2c(source / "stories260K.bin", source / "tok512.bin", tmp_path / "story")
    recipe["model"]["language"]["path"] = str(tmp_path / "story")
    align = recipe["stages"]["align"]
    align["data"] = {**align["data"], "template": {"kind": "plain"}}
    parsed = Recipe.model_validate(recipe)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "story")
    vlm = build_vlm(parsed.model, read_metadata(parsed.model, 256), frozen_dtype=torch.float32, seed=0).eval()
    options = {"max_new_tokens": NUM_NEW_TOKENS, "do_sample": False, "eos_token_id": None}
    begin = torch.tensor([[tokenizer.bos_token_id]])
    told = LiveModel(vlm).generate(begin, **options)
    assert tokenizer.decode(told[0], skip_special_tokens=True) == reference

    write_finished(recipe, "align")  # the projector is another one now, and the vocabulary has a row for images
    assert merge_main([recipe["run"], str(tmp_path / "bundle"), "--stage", "align"]) == 0
    bundle = AutoModelForImageTextToText.from_pretrained(tmp_path / "bundle", dtype="auto").eval()
    assert bundle.get_input_embeddings().weight.shape[0] == 513
    told = bundle.generate(input_ids=begin, **options)
    assert tokenizer.decode(told[0], skip_special_tokens=True) == reference
