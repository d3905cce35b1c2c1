"""Under ZeRO-3 a base is read into its partitions: the same numbers to the bit, and no rank ever holds all of it."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.backbones import make_clip, make_language, tiny_recipe
from tests.support.live_bytes import LiveBytes
from tests.support.ranks import run_on_ranks
from tests.support.shards import write_set
from tests.support.training import losses, same_weights, train, vary
from trainer.config.recipe import Recipe
from trainer.distributed.context import DistributedContext

FULL = {"kind": "full", "learning_rate": 1e-3}
DORA = {"kind": "lora", "learning_rate": 1e-2, "rank": 4, "alpha": 8, "dora": True}
LORA = {"kind": "lora", "learning_rate": 1e-2, "rank": 4, "alpha": 8}
QUANTIZED = ("nf4", "int8") if find_spec("bitsandbytes") else ()
CHAIN = {
    "align": {"vision": FULL, "projector": FULL, "language": FULL},
    "lora": {"vision": DORA, "language": DORA},
}
"""The second stage starts from weights that the first has trained, and hands them on: no pretrained base has them."""


def whole(*_: Any) -> Any:
    """A placement that divides nothing: every rank reads the whole base, and DeepSpeed divides it afterwards."""
    from models.placement import Placement

    return Placement(torch.device("cpu"))


def trained(ranks: DistributedContext, jobs: list[tuple[dict[str, Any], str, dict[str, Any]]], before: bool) -> None:
    from trainer import build

    if before:
        build.placement_for = whole
    for recipe, stage, options in jobs:
        train(ranks, recipe, stage, **options)


def unknown_decoder(folder: Path) -> Path:
    """One whose layers are not known here, with embeddings that are its head, in a directory that holds both."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    make_language(folder)
    facts = json.loads((folder / "config.json").read_text())
    shape = {key: facts[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    torch.manual_seed(3)
    config = AutoConfig.for_model("phi3", **shape, num_attention_heads=4, tie_word_embeddings=True, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(config)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def recipes(folder: Path, run: str) -> dict[str, dict[str, Any]]:
    made = tiny_recipe(folder, folder / "shards")
    for name, tune in CHAIN.items():
        made["stages"][name] |= {
            "tune": tune,
            "duration": {"unit": "steps", "count": 3},
            "checkpoint": {"every_steps": 1},
        }
        made["stages"][name]["engine"] = {"zero": "zero3", "precision": "bf16"}
    made["stages"]["lora"]["engine"] = {"zero": "zero3_offload", "precision": "fp32"}
    chain = vary(made, f"chain_{run}", "lora")
    foreign = vary(made, f"foreign_{run}", "align", tune={"projector": FULL}, engine__precision="fp32")
    foreign["model"] = {**foreign["model"], "language": {"kind": "pretrained", "path": str(folder / "unknown")}}
    made = {"chain": chain, "foreign": foreign}
    for load in QUANTIZED:
        changes = {
            "init": None,
            "tune": {"projector": FULL, "language": LORA},
            "engine": chain["stages"]["align"]["engine"],
        }
        made[load] = vary(chain, f"{load}_{run}", "lora", **changes)
        made[load]["model"] = {**chain["model"], "language": {**chain["model"]["language"], "load": load}}
    return made


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Two stages in a chain, and a decoder of another class: from whole bases, and from divided ones with a restart."""
    folder = tmp_path_factory.mktemp("partitions")
    write_set(folder / "shards", [5, 1, 9])
    make_clip(folder / "vision")
    make_language(folder / "language")
    unknown_decoder(folder / "unknown")
    found = {}
    for run in ("whole", "divided"):
        of = recipes(folder, run)
        stops: list[dict[str, Any]] = [{"stop_after": 2}, {}] if run == "divided" else [{}]
        jobs = [(of["chain"], stage, options) for stage in CHAIN for options in stops]
        jobs += [(of["foreign"], "align", {}), *((of[load], "lora", {}) for load in QUANTIZED)]
        run_on_ranks(2, trained, jobs, run == "whole")
        found |= {f"{name}_{run}": recipe for name, recipe in of.items()}
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "stage"),
    [*(("chain", stage) for stage in CHAIN), ("foreign", "align"), *((load, "lora") for load in QUANTIZED)],
)
def test_it_learns_what_it_learnt_from_a_whole_base(runs: dict[str, dict[str, Any]], name: str, stage: str) -> None:
    """Full tuning in bf16 with masters, DoRA over a tuned base, both resumed; a class whose packing is probed."""
    one, other = runs[f"{name}_divided"], runs[f"{name}_whole"]
    assert losses(one, stage) == losses(other, stage)
    same_weights(one, other, stage, rtol=0, atol=0)


def peaks(ranks: DistributedContext, recipe: dict[str, Any], before: bool) -> tuple[int, int, int]:
    """Of a stage while it is built: bytes of its base, of the base's largest tensor, and the most that a rank held."""
    import os

    from trainer import build

    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # read in this thread, where it is counted
    if before:
        build.placement_for = whole
    with LiveBytes() as live:
        opened = build.build_stage(Recipe.model_validate_json(json.dumps(recipe)), "align", ranks)
    try:
        vlm = opened.services.engine.module.vlm
        parts = (vlm.vision, vlm.language)
        sizes = [each.ds_numel * each.element_size() for part in parts for each in part.parameters()]
        return sum(sizes), max(sizes), live.peak
    finally:
        opened.close()


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["zero3", "zero3_offload"])
@pytest.mark.parametrize("load", ["full", *QUANTIZED])
def test_no_rank_ever_holds_the_whole_base(tmp_path: Path, zero: str, load: str) -> None:
    make_clip(tmp_path / "vision")
    make_language(tmp_path / "language", width=128, num_layers=8 if load == "full" else 32)  # of as many bytes
    write_set(tmp_path / "shards", [5, 1, 9])
    recipe = tiny_recipe(tmp_path, tmp_path / "shards", align={"engine": {"zero": zero, "precision": "fp32"}})
    recipe["model"]["language"]["load"] = load
    beside = 8 * 4 * 128 * (32 + 128)  # the projector, its fp32 buffers, gradient, and DeepSpeed's buckets of its size
    for size, largest, peak in run_on_ranks(2, peaks, recipe, False):
        assert peak < size / 2 + 3 * largest + beside
        assert peak < 0.85 * size
    assert all(peak > size for size, _, peak in run_on_ranks(2, peaks, vary(recipe, "before", "align"), True))
