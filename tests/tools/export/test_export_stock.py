"""A bundle as a directory for the hub: the same model in forms that other programs take, without our paths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import sightline
from models.bundle import read_manifest, verify
from models.common.errors import run_cli
from models.common.sharded import TensorFiles
from models.projectors.linear import gelu_pair
from tests.support.bundles import image
from tests.support.checkpoints import write_finished
from tests.support.foreign import with_dinov2
from tests.support.qformer import make_vit
from tests.support.towers import make_dinov3, make_internvit
from tests.tools.conftest import beside, merge, run_of
from tools.export.__main__ import main

FIGURES = {
    "model": "runs/x",
    "results": [
        {
            "name": "pope",
            "metrics": {"accuracy": 0.875, "f1": None},
            "intervals": {"accuracy": {"low": 0.8, "high": 0.95}},
            "num_samples": 8,
        }
    ],
}


@pytest.mark.slow
def test_the_directory_is_the_bundle_and_a_card(trained_in_any: dict[str, Any], tmp_path: Path) -> None:
    bundle, out, figures = beside(trained_in_any, "bundle"), tmp_path / "hub", tmp_path / "figures.json"
    figures.write_text(json.dumps(FIGURES))
    words = ["--to", "stock", "--licence", "apache-2.0", "--figures", str(figures), "--probes", "1"]
    assert run_cli(main, [str(bundle), str(out), *words]) == 0
    before, after = TensorFiles.open(bundle), TensorFiles.open(out)
    assert set(before) == set(after)
    assert all(torch.equal(before.read(name), after.read(name)) for name in before)
    assert verify(out).parity.reference == "the bundle"
    front, _, body = (out / "README.md").read_text().removeprefix("---\n").partition("\n---\n")
    assert yaml.safe_load(front)["license"] == "apache-2.0"
    assert yaml.safe_load(front)["pipeline_tag"] == "image-text-to-text"
    for words_of_card in (
        "| pope | accuracy | 0.8750 | 0.8 to 0.95 | 8 |",
        "largest relative logit difference",
        "| tuned: language | kind lora, learning_rate 0.01, rank 4",
        "| shards | by its size |",
        "`apache-2.0`. It was made from `vision`, `language`",
    ):
        assert words_of_card in body
    model = sightline.load(out, device="cpu")
    assert model.chat(image(), "What is it?", max_new_tokens=4) == sightline.load(bundle, device="cpu").chat(
        image(), "What is it?", max_new_tokens=4
    )


def test_nothing_tells_of_this_machine(trained: dict[str, Any], tmp_path: Path) -> None:
    """The bundle's manifest has the paths of its recipe; what is uploaded has none."""
    bundle, out = beside(trained, "bundle"), tmp_path / "hub"
    assert str(bundle.parent) in (bundle / "sightline.json").read_text()
    assert run_cli(main, [str(bundle), str(out), "--to", "stock", "--probes", "1"]) == 0
    for file in out.iterdir():
        assert str(bundle.parent).encode() not in file.read_bytes(), file.name
        assert str(tmp_path).encode() not in file.read_bytes(), file.name


@pytest.mark.slow
def test_a_run_is_merged_first(trained: dict[str, Any], tmp_path: Path) -> None:
    assert run_cli(main, [trained["run"], str(tmp_path / "hub"), "--to", "stock", "--probes", "1"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["hub"], "the merged one has gone"


def linear(folder: Path, width: int) -> Path:
    recipe = run_of(folder, projector="linear", width=width)
    write_finished(recipe, "lora")
    assert merge(recipe, folder / "bundle", "--probes", "1") == 0
    return folder / "bundle"


@pytest.mark.slow
def test_a_linear_projector_becomes_a_pair_with_gelu(tmp_path: Path) -> None:
    bundle, out = linear(tmp_path, width=64), tmp_path / "hub"
    assert run_cli(main, [str(bundle), str(out), "--to", "stock", "--probes", "2"]) == 0
    assert json.loads((out / "config.json").read_text())["projector_hidden_act"] == "gelu"
    checks = {check.name: check.value for check in read_manifest(out).parity.checks}
    assert 0 < checks["largest relative logit difference"] < 1e-5
    assert checks["a whole answer is written by stock transformers"] == 1


@pytest.mark.slow
def test_a_linear_projector_that_is_too_wide_stays_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, out = linear(tmp_path, width=32), tmp_path / "hub"
    assert run_cli(main, [str(bundle), str(out), "--to", "stock", "--probes", "1"]) == 0
    assert "vLLM refuses its projector of one layer (widths 32 and 32" in capsys.readouterr().out
    assert json.loads((out / "config.json").read_text())["projector_hidden_act"] == "linear"


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 3e-6), (torch.bfloat16, 2e-2)])
def test_the_pair_is_the_layer(approximate: str, dtype: torch.dtype, bound: float) -> None:
    """In bf16 within two roundings of the output's size: no worse than the one layer in bf16."""
    torch.manual_seed(0)
    weight, bias = torch.randn(64, 24) / 5, torch.randn(64)
    x = (3 * torch.randn(100, 24)).to(dtype)
    pair = gelu_pair(weight.to(dtype), bias.to(dtype))
    assert pair is not None
    hidden = torch.nn.functional.gelu(
        torch.nn.functional.linear(x, pair["linear_1.weight"], pair["linear_1.bias"]), approximate=approximate
    )
    found = torch.nn.functional.linear(hidden, pair["linear_2.weight"], pair["linear_2.bias"]).float()
    expected = torch.nn.functional.linear(x.float(), weight, bias)
    assert (found - expected).abs().max() < bound * expected.abs().max()
    assert gelu_pair(torch.zeros(47, 24), torch.zeros(47)) is None


def test_what_only_this_project_computes_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = run_of(tmp_path)
    recipe["model"]["projector"] = {"kind": "perceiver", "num_queries": 5, "num_layers": 2, "num_heads": 4}
    write_finished(recipe, "lora")
    assert merge(recipe, tmp_path / "bundle", "--probes", "1") == 0
    assert run_cli(main, [str(tmp_path / "bundle"), str(tmp_path / "hub"), "--to", "stock"]) == 2
    said = capsys.readouterr().err
    assert "SightlineForConditionalGeneration cannot be exported to stock" in said
    assert "the projector 'perceiver'" in said
    assert "`sightline.load` opens the bundle" in said
    assert not (tmp_path / "hub").exists()


def test_figures_that_are_none(trained: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "figures.json").write_text('{"loss": 1}')
    words = ["--to", "stock", "--probes", "1", "--figures", str(tmp_path / "figures.json")]
    assert run_cli(main, [str(beside(trained, "bundle")), str(tmp_path / "hub"), *words]) == 2
    assert "figures.json: not what eval.run writes" in capsys.readouterr().err
    assert not (tmp_path / "hub").exists()


def dinov2(recipe: dict[str, Any], folder: Path) -> dict[str, Any]:
    return with_dinov2(recipe, folder)


def vit(recipe: dict[str, Any], folder: Path) -> dict[str, Any]:
    recipe["model"]["vision"] = {"kind": "vit", "path": str(make_vit(folder / "vit"))}
    return recipe


def internvit(recipe: dict[str, Any], folder: Path) -> dict[str, Any]:
    recipe["model"]["vision"] = {"kind": "internvit", "path": str(make_internvit(folder / "internvit"))}
    return recipe


@pytest.mark.slow
@pytest.mark.parametrize(
    ("with_tower", "name"),
    [
        (dinov2, "encoder.layer.0.attention.attention.query.weight"),
        (vit, "encoder.layer.0.intermediate.dense.weight"),
        (internvit, "encoder.layer.0.attention.q_proj.weight"),
    ],
)
def test_a_tower_has_the_hubs_names(tmp_path: Path, with_tower: Any, name: str) -> None:
    """As `save_pretrained` writes them, which transformers 4.57 knows alone: others it would draw anew."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    recipe = with_tower(run_of(tmp_path), tmp_path)
    write_finished(recipe, "lora")
    assert merge(recipe, tmp_path / "bundle", "--probes", "1") == 0
    assert run_cli(main, [str(tmp_path / "bundle"), str(tmp_path / "hub"), "--to", "stock", "--probes", "1"]) == 0
    words = ["--to", "adapter", "--base", str(tmp_path / "base"), "--probes", "1"]
    assert run_cli(main, [recipe["run"], str(tmp_path / "adapter"), *words]) == 0
    drawn = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(tmp_path / "bundle"))
    drawn.save_pretrained(tmp_path / "saved")
    expected = {each for each in TensorFiles.open(tmp_path / "saved") if each.startswith("vision_tower.")}
    assert f"vision_tower.{name}" in expected
    for written in ("hub", "base"):
        found = {each for each in TensorFiles.open(tmp_path / written) if each.startswith("vision_tower.")}
        assert found == expected, written


@pytest.mark.slow
@pytest.mark.parametrize("gated", [False, True])
def test_what_dinov2_cannot_be_exported_to_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], gated: bool
) -> None:
    from transformers import Dinov2Config, Dinov2Model

    recipe = with_dinov2(run_of(tmp_path), tmp_path)
    if gated:
        config = Dinov2Config.from_pretrained(tmp_path / "dinov2", use_swiglu_ffn=True)
        Dinov2Model(config).save_pretrained(tmp_path / "dinov2")
    write_finished(recipe, "lora")
    assert merge(recipe, tmp_path / "bundle", "--probes", "1") == 0
    format_name, said = ("stock", "gated layers") if gated else ("w4a16", "a tower of type dinov2")
    assert run_cli(main, [str(tmp_path / "bundle"), str(tmp_path / "out"), "--to", format_name]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_registers_are_named_where_nobody_else_computes_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = run_of(tmp_path)
    recipe["model"]["vision"] = {"kind": "dinov3", "path": str(make_dinov3(tmp_path / "dinov3"))}
    write_finished(recipe, "lora")
    assert merge(recipe, tmp_path / "bundle", "--probes", "1") == 0
    assert run_cli(main, [str(tmp_path / "bundle"), str(tmp_path / "out"), "--to", "stock"]) == 2
    assert "no other program computes the registers of its dinov3_vit tower" in capsys.readouterr().err
