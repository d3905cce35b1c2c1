"""A published model end to end: tuned by LoRA, killed, resumed, merged into its own layout, opened by its own class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from models.build import build_vlm, read_metadata
from models.bundle import verify
from models.common.errors import run_cli
from models.common.sharded import TensorFiles
from tests.support import native
from tests.support.checkpoints import write_finished
from tests.support.families import SIZES, answer_and_score, merge_and_open, train_and_resume
from tests.support.published import FAMILIES, assert_stock_logits, make_published, published
from tests.support.qformer import qformer_recipe
from tests.support.ranks import run_on_ranks
from tests.support.shards import caption_sample, image_bytes, write_tar
from tests.support.training import losses, train_all, weights
from tests.tools.conftest import run_of
from tools.export.merge import main as merge
from tools.export.quantize import main as quantize

CLASSES = {
    **native.CLASSES,
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
    "llava_onevision": "LlavaOnevisionForConditionalGeneration",
}


def recipe_over(folder: Path, published: Path, **tune: Any) -> dict[str, Any]:
    """One LoRA stage over a published model, on images of several proportions and a text without one."""
    from data_pipeline.index_build import build_index

    (folder / "shards").mkdir(parents=True)
    samples = [(f"{n:03d}", caption_sample(n) | {"png": image_bytes(n, SIZES[n % len(SIZES)])}) for n in range(11)]
    write_tar(folder / "shards" / "a.tar", [*samples, ("999", caption_sample(999, image=False))])
    build_index(folder / "shards")
    lora = {"kind": "lora", "learning_rate": 1e-2, "rank": 4, "alpha": 8}
    data = {"sources": [{"path": str(folder / "shards")}], "template": {"kind": "model"}, "max_length": 256}
    stage = {
        "tune": {"projector": {"kind": "full", "learning_rate": 1e-3}, "language": lora, **tune},
        "data": {**data, "num_workers": 0, "packing": {"kind": "pack", "row_tokens": 512}},
        "duration": {"unit": "steps", "count": 6},
        "batch": {"global_rows": 2, "micro_rows": 1},
        "engine": {"zero": "zero2", "precision": "fp32"},
        "checkpoint": {"every_steps": 1, "keep": 10},
    }
    model = {"kind": "published", "path": str(published)}
    return {"name": "tiny", "run": str(folder / "run"), "model": model, "stages": {"sft": stage}}


def assert_same_layout(merged: Path, published: Path, *, may_change: bool) -> None:
    """Names, dtypes, shapes and side files are the published ones; without training the bytes are, too."""
    found, expected = TensorFiles.open(merged), TensorFiles.open(published)
    assert set(found) == set(expected)
    differing = set()
    for name in expected:
        left, right = found.read(name), expected.read(name)
        assert (left.dtype, left.shape) == (right.dtype, right.shape), name
        if not torch.equal(left, right):
            differing.add(name)
    assert bool(differing) == may_change
    for file in published.iterdir():
        if file.suffix != ".safetensors":
            assert (merged / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_family_works_end_to_end(tmp_path: Path, family: str) -> None:
    folder = make_published(tmp_path / "published", family, tied=family == "llava_next")
    recipe = recipe_over(tmp_path, folder)
    train_and_resume(recipe)
    predictor = merge_and_open(recipe, tmp_path / "merged")
    assert type(predictor.model).__name__ == CLASSES[family]
    assert_same_layout(tmp_path / "merged", folder, may_change=True)
    answers = answer_and_score(predictor, tmp_path)
    assert len(set(answers)) > 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("llava", torch.bfloat16),
        ("llava_next", torch.float32),
        ("qwen2_5_vl", torch.bfloat16),
        ("qwen3_vl", torch.float32),
    ],
)
def test_untrained_every_tensor_comes_back(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    folder = make_published(tmp_path / "published", family, dtype=dtype)
    recipe = recipe_over(tmp_path, folder)
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    words = [str(tmp_path / "recipe.json"), "--untrained", "--out", str(tmp_path / "merged")]
    assert run_cli(merge, words) == 0
    assert_same_layout(tmp_path / "merged", folder, may_change=False)
    manifest = verify(tmp_path / "merged")
    assert manifest.precision == ("bf16" if dtype == torch.bfloat16 else "fp32")
    assert manifest.parity.passed


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl", "qwen3_vl"])
def test_calibration_reads_the_family(tmp_path: Path, family: str) -> None:
    recipe = recipe_over(tmp_path, make_published(tmp_path / "published", family))
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    assert run_cli(merge, [str(tmp_path / "recipe.json"), "--untrained", "--out", str(tmp_path / "merged")]) == 0
    words = [str(tmp_path / "merged"), str(tmp_path / "small"), "--calibrate", "--probes", "3", "--force"]
    assert run_cli(quantize, words) == 0
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []


@pytest.mark.slow
def test_every_part_takes_adapters_and_what_comes_out_starts_the_next_run(tmp_path: Path) -> None:
    """LoRA on the tower, DoRA on the projector; then a second run over the first one's bundle."""
    folder = make_published(tmp_path / "published")
    adapters = {
        "vision": {"kind": "lora", "learning_rate": 1e-3, "rank": 2, "alpha": 4, "targets": ["q_proj", "fc1"]},
        "projector": {"kind": "lora", "learning_rate": 1e-2, "rank": 3, "alpha": 6, "dora": True},
    }
    recipe = recipe_over(tmp_path / "first", folder, **adapters)
    train_and_resume(recipe)
    learnt = weights(recipe, "sft")
    assert sum(".lora_B." in name for name in learnt if name.startswith("vision.")) == 2 * 2  # two of three layers
    assert sum("lora_magnitude" in name for name in learnt if name.startswith("projector.")) == 2
    merge_and_open(recipe, tmp_path / "merged")
    before, after = (TensorFiles.open(each) for each in (folder, tmp_path / "merged"))
    changed = {name for name in before if not torch.equal(before.read(name), after.read(name))}
    assert sum(name.startswith("vision_tower.") for name in changed) == 4
    assert {"multi_modal_projector.linear_1.weight", "multi_modal_projector.linear_2.weight"} <= changed
    second = recipe_over(tmp_path / "second", tmp_path / "merged")
    run_on_ranks(1, train_all, [(second, "sft", {})])
    assert losses(second, "sft")[0] < losses(recipe, "sft")[0]
    merge_and_open(second, tmp_path / "merged_again")


@pytest.mark.slow
@pytest.mark.parametrize("family", native.NATIVE[1:])
def test_tower_and_mergers_of_native_resolution_take_adapters(tmp_path: Path, family: str) -> None:
    """LoRA on every linear layer of the tower, DoRA on the mergers; within bounds, which go into the processor."""
    folder = make_published(tmp_path / "published", family)
    adapters = {
        "vision": {"kind": "lora", "learning_rate": 1e-3, "rank": 2, "alpha": 4},
        "projector": {"kind": "lora", "learning_rate": 1e-2, "rank": 3, "alpha": 6, "dora": True},
    }
    recipe = recipe_over(tmp_path, folder, **adapters)
    recipe["model"]["max_image_tokens"] = 16
    recipe["stages"]["sft"]["duration"]["count"] = 2
    run_on_ranks(1, train_all, [(recipe, "sft", {})])
    predictor = merge_and_open(recipe, tmp_path / "merged")
    assert predictor.processor.image_processor.size["longest_edge"] == 16 * (native.PATCH * native.MERGE) ** 2
    before, after = (TensorFiles.open(each) for each in (folder, tmp_path / "merged"))
    changed = {name for name in before if not torch.equal(before.read(name), after.read(name))}
    tower = [name for name in before if "visual." in name and name.endswith("weight")]
    linears = {name for name in tower if len(before.stored(name).shape) == 2 and "pos_embed" not in name}
    assert {name for name in changed if "visual." in name} == linears


def own_bundle(folder: Path, kind: str) -> Path:
    """A bundle with parts that stock Llava has no place for."""
    recipe = qformer_recipe(folder, folder / "shards") if kind == "qformer" else run_of(folder, width=32)
    recipe["stages"]["lora"]["init"] = None
    if kind == "perceiver":
        recipe["model"]["projector"] = {"kind": "perceiver", "num_queries": 5, "num_layers": 2, "num_heads": 4}
    if kind == "decoder":
        shape = {"num_layers": 2, "num_heads": 4, "width": 32, "max_positions": 512}
        language = {"kind": "decoder", "tokenizer": str(folder / "language"), **shape}
        recipe["model"] |= {"language": language, "future": {"kind": "parallel", "num_tokens": 3}}
        full = {"kind": "full", "learning_rate": 1e-2}
        recipe["stages"] = {"lora": recipe["stages"]["lora"]}
        recipe["stages"]["lora"] |= {
            "objective": {"kind": "multi_token"},
            "tune": {"projector": full, "language": full, "future": full},
        }
    write_finished(recipe, "lora")
    words = [recipe["run"], str(folder / "bundle"), "--stage", "lora", "--probes", "1"]
    assert run_cli(merge, words) == 0
    return folder / "bundle"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qformer", "perceiver", "decoder"])
def test_a_bundle_of_every_family_starts_a_run(tmp_path: Path, kind: str) -> None:
    """Its parts compute what its class does, heads for further tokens included; untrained it comes back as it was."""
    bundle = own_bundle(tmp_path / "first", kind)
    assert_stock_logits(bundle)
    source = published(bundle)
    vlm = build_vlm(source, read_metadata(source, 128), frozen_dtype=torch.float32, seed=0)
    if kind == "decoder":
        files = TensorFiles.open(bundle)
        for name, value in vlm.future.named_parameters():
            assert torch.equal(value, files.read(f"future.{name}"))
    recipe = recipe_over(tmp_path / "second", bundle)
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    words = [str(tmp_path / "recipe.json"), "--untrained", "--out", str(tmp_path / "again"), "--probes", "1"]
    assert run_cli(merge, words) == 0
    before, after = TensorFiles.open(bundle), TensorFiles.open(tmp_path / "again")
    assert set(before) == set(after)
    assert all(torch.equal(before.read(name), after.read(name)) for name in before)
