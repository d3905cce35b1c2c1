"""Preflight: every shipped recipe can be looked at without its weights; each fault is a line; memory is as measured."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import WeakSet

import pytest
import torch

from data_pipeline.batch import collate
from models.build import build_vlm, read_facts
from models.errors import InputError, run_cli
from tests.support.backbones import tiny_recipe, write_recipe
from tests.support.paths import REPOSITORY
from tests.support.shards import write_set
from tools.preflight import memory
from tools.preflight.__main__ import main, parse_bytes
from tools.preflight.geometry import count_parts, find_part
from trainer.config import Full, Lora, MultiToken, NextToken, TuningPlan
from trainer.flops import count
from trainer.held_out import HeldOut
from trainer.objectives import build_objective
from trainer.recipe import Recipe
from trainer.shapes import read_shape
from trainer.step import TrainStep
from trainer.tuning import apply_plan

FULL = Full(learning_rate=1.0)
PLANS = {
    "align": TuningPlan(projector=FULL),
    "lora": TuningPlan(projector=FULL, language=Lora(learning_rate=1.0, rank=4, alpha=8)),
    "dropout": TuningPlan(projector=FULL, language=Lora(learning_rate=1.0, rank=4, alpha=8, dropout=0.1)),
    "full": TuningPlan(projector=FULL, language=FULL),
}
SHIPPED = sorted(file.stem for file in (REPOSITORY / "recipes").glob("*.yaml"))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("preflight")
    write_set(folder / "shards", [5, 1, 9], words=20)
    return tiny_recipe(folder, folder / "shards")


def run(recipe: dict[str, Any], folder: Path, *words: str) -> int:
    file = write_recipe(folder / "recipe.yaml", recipe)
    return run_cli(main, [str(file), "--run", str(folder / "run"), *words])


@pytest.mark.parametrize("stem", SHIPPED)
def test_every_shipped_recipe_can_be_looked_at_without_its_weights(
    stem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # neither data nor weights lie here
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert run_cli(main, [str(REPOSITORY / "recipes" / f"{stem}.yaml"), "--gpus", "8"]) == 1
    said = capsys.readouterr().out
    faults = said.partition("\nfaults\n")[2].splitlines()
    assert any("no shard set" in fault for fault in faults)
    if stem == "vicuna7b_clip_linear":
        assert "4,198,400 (4.2M)" in said
        assert "39,976,960 (40.0M)" in said  # rank 16 on every linear of a 7B
        assert "6,738,415,616" in said
        assert "activation_checkpointing: false" in said
    if ("vicuna7b" in stem or "qwen" in stem) and not stem.endswith("_tiny"):
        assert "together" in said
        assert "the parts' files are not on this machine" in said


def test_a_sound_recipe_has_nothing_in_its_way(
    recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(recipe, tmp_path, "--gpus", "2", "--gpu-memory", "8GiB") == 0
    said = capsys.readouterr().out
    for words in (
        "nothing stands in the way",
        "15 samples in 3 shards; 3 to 4 a row",
        "15 of 15 samples encode",
        "image tokens are as many as features: 16 a tile",
        "in a real forward of 4 samples",
        "6 steps; 0.0 hours, computed from",
        "an assumed 35% of 2 x 989 TFLOP/s",
    ):
        assert words in said
    assert 'class="learnt"' in (tmp_path / "run" / "preflight" / "lora.html").read_text()


@pytest.mark.parametrize(
    ("changes", "words", "named"),
    [
        ({}, ["--gpus", "5"], "4 rows for 5 GPUs"),
        ({"batch": {"global_rows": 16, "micro_rows": 2}}, [], "1 of 16 rows of the global batch have no sample"),
        ({}, ["--gpu-memory", "1GB"], "a GPU has 1.00 GB: lower stages.align.batch.micro_rows"),
        ({}, ["stages.align.data.max_length=20"], "15 of 15 samples cannot be used, the first: shard-"),
        ({}, ["stages.align.data.max_length=9999"], "9999 is more than the 512 positions"),
        ({}, ["stages.align.data.sources.0.path=nodata"], "no shard set at nodata"),
        ({}, ["model.language.path=owner/unheard-of"], "its shapes are not known here"),
    ],
)
def test_each_fault_is_a_line_and_an_exit_code(
    recipe: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    words: list[str],
    named: str,
) -> None:
    varied = json.loads(json.dumps(recipe))
    varied["stages"]["align"] |= changes
    assert run(varied, tmp_path, "--stage", "align", *words) == 1
    faults = capsys.readouterr().out.partition("\nfaults\n")[2].splitlines()
    assert any(named in fault for fault in faults), faults


def test_checkpoints_that_do_not_fit_are_a_fault(
    recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=100_000))
    assert run(recipe, tmp_path, "--stage", "align") == 1
    assert "do not fit into 0.10 MB" in capsys.readouterr().out.partition("\nfaults\n")[2]


def test_sizes_are_read_with_their_units() -> None:
    assert (parse_bytes("80GB"), parse_bytes("24 GiB"), parse_bytes("16")) == (80e9, 24 * 2**30, 16e9)
    with pytest.raises(InputError, match="80GB or 24GiB"):
        parse_bytes("lots")


class Saved:
    """A tensor in the keeping of autograd's graph: it goes when its node does."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def kept_by_autograd(module: TrainStep, batch: Any) -> int:
    """Bytes of every storage that a forward keeps for its backward, the parameters' own left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    alive = WeakSet[Saved]()

    def pack(tensor: torch.Tensor) -> Saved:
        saved = Saved(tensor)
        alive.add(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        sums = module(batch)
    assert sums.loss_sum.requires_grad
    storages = [saved.tensor.untyped_storage() for saved in alive]
    return sum({each.data_ptr(): each.nbytes() for each in storages if each.data_ptr() not in own}.values())


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_estimate_is_what_tensors_take(
    recipe: dict[str, Any], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed = Recipe.model_validate_json(json.dumps(recipe))
    monkeypatch.setattr(memory, "MASK_BYTES", 4)  # a CPU keeps a dropout mask in fp32
    facts = read_facts(parsed.model, 256)
    shape, element = read_shape(parsed.model), 2 if precision == "bf16" else 4
    held_out = HeldOut(parsed.stage("align").data, facts, 4)
    batch = collate([(sample,) for sample in held_out.encoded(range(4))], facts.text)  # type: ignore[arg-type, misc]
    configs = [find_part(parsed.model.vision.path).config, find_part(parsed.model.language.path).config]  # type: ignore[union-attr]
    for name, plan in PLANS.items():
        vlm = build_vlm(parsed.model, facts, frozen_dtype=torch.bfloat16 if element == 2 else torch.float32, seed=0)
        apply_plan(vlm, plan, seed=0)
        counts = count_parts(parsed.model, configs[0], configs[1], plan)
        learns = sum(value.numel() for value in vlm.parameters() if value.requires_grad)
        frozen = [value for value in vlm.parameters() if not value.requires_grad]
        states = memory.states(
            counts, learns, element, load="full", zero=0, num_gpus=1, settings=memory.read_settings("zero0")
        )
        assert sum(part.trained for part in counts.values()) == learns, name
        assert states["trained weights"] == 4 * learns
        assert states["frozen weights"] == sum(value.numel() * value.element_size() for value in frozen), name
        stage = parsed.stage("align").model_copy(update={"tune": plan})
        estimate = memory.activations(shape, stage, count([batch]), element)
        copies = 2.0 * learns if element == 2 else 0.0
        kept = kept_by_autograd(TrainStep(vlm, build_objective(NextToken()), precision).train(), batch)
        # Left out: rotary angles, group indices and the queries of the last layer; shares of a model of 32 columns.
        assert estimate + copies == pytest.approx(kept, rel=0.15), name
        assert memory.activations(shape, stage, count([batch]), element, 2) < estimate


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parallel", "sequential"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_heads_take_what_is_estimated(recipe: dict[str, Any], precision: str, kind: str) -> None:
    parsed = Recipe.model_validate(recipe | {"model": recipe["model"] | {"future": {"kind": kind}}})
    facts, element = read_facts(parsed.model, 256), 2 if precision == "bf16" else 4
    held_out = HeldOut(parsed.stage("align").data, facts, 4)
    batch = collate([(sample,) for sample in held_out.encoded(range(4))], facts.text)  # type: ignore[arg-type, misc]
    shape = read_shape(parsed.model)
    for name in ("align", "lora"):
        plan = PLANS[name].model_copy(update={"future": FULL})
        vlm = build_vlm(parsed.model, facts, frozen_dtype=torch.bfloat16 if element == 2 else torch.float32, seed=0)
        apply_plan(vlm, plan, seed=0)
        stage = parsed.stage("align").model_copy(update={"tune": plan, "objective": MultiToken()})
        estimate = memory.activations(shape, stage, count([batch]), element)
        copies = sum(2.0 * value.numel() for value in vlm.parameters() if value.requires_grad) if element == 2 else 0.0
        kept = kept_by_autograd(TrainStep(vlm, build_objective(MultiToken()), precision).train(), batch)
        assert estimate + copies == pytest.approx(kept, rel=0.15), name
