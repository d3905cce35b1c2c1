"""A tuned model of native resolution in the formats of other programs: its own class opens each of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from models.bundle import read_manifest, verify
from models.common.errors import run_cli
from models.common.sharded import TensorFiles
from models.opening import open_model, open_processor
from tests.support.checkpoints import write_finished
from tests.support.native import CLASSES, NATIVE
from tests.support.published import make_published
from tools.export.__main__ import main
from tools.export.calibrate import _first_inputs, _with_answer
from tools.export.golden import drawn
from tools.export.merge import main as merge
from tools.export.packed import LEAVES
from tools.export.parity import difference, read_bundle, read_stock

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=NATIVE[1:])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Merged: language model and tower by LoRA, mergers in full; its layers fit into groups of 32."""
    folder = tmp_path_factory.mktemp(request.param)
    lora = {"kind": "lora", "learning_rate": 1e-2, "rank": 4, "alpha": 8}
    data = {"sources": [{"path": str(folder / "shards")}], "template": {"kind": "model"}, "max_length": 256}
    stage: dict[str, Any] = {
        "tune": {"language": lora, "vision": lora, "projector": {"kind": "full", "learning_rate": 1e-3}},
        "data": data,
        "duration": {"unit": "steps", "count": 6},
        "batch": {"global_rows": 2, "micro_rows": 1},
        "engine": {"zero": "zero2", "precision": "fp32"},
    }
    model = {"kind": "published", "path": str(make_published(folder / "published", request.param, width=64))}
    recipe = {"name": "tiny", "run": str(folder / "run"), "model": model, "stages": {"sft": stage}}
    write_finished(recipe, "sft")
    assert run_cli(merge, [recipe["run"], str(folder / "bundle"), "--probes", "1"]) == 0
    return folder / "bundle"


def family_of(bundle: Path) -> str:
    return str(json.loads((bundle / "config.json").read_text())["model_type"])


@pytest.mark.slow
def test_the_directory_for_the_hub_is_the_bundle_and_a_card(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "hub"
    assert run_cli(main, [str(bundle), str(out), "--to", "stock", "--probes", "2"]) == 0
    before, after = TensorFiles.open(bundle), TensorFiles.open(out)
    assert set(before) == set(after)
    assert all(torch.equal(before.read(name), after.read(name)) for name in before)
    parity = verify(out).parity
    assert (parity.passed, parity.reference) == (True, "the bundle")
    assert type(open_model(out, CPU)).__name__ == CLASSES[family_of(bundle)]
    text = json.loads((out / "config.json").read_text())["text_config"]
    assert text["rope_scaling"]["mrope_section"] == text["rope_parameters"]["mrope_section"]
    front, _, body = (out / "README.md").read_text().removeprefix("---\n").partition("\n---\n")
    assert yaml.safe_load(front)["tags"] == ["sightline", family_of(bundle)]
    assert "`AutoProcessor` needs torchvision" in body


@pytest.mark.slow
def test_packed_the_decoder_is_integers_and_the_tower_whole(bundle: Path, tmp_path: Path) -> None:
    """The class's own reader, whole in memory, computes what the report has compared, one layer at a time."""
    out = tmp_path / "w4a16"
    assert run_cli(main, [str(bundle), str(out), "--to", "w4a16", "--force"]) == 0
    before, after = TensorFiles.open(bundle), TensorFiles.open(out)
    replaced = {name.removesuffix("weight") for name in before if name not in after}
    assert len(replaced) == 3 * 7
    assert all(".layers." in stem and "visual" not in stem for stem in replaced)
    kept = [name for name in before if name in after]
    assert set(after) == {*kept, *(f"{stem}{leaf}" for stem in replaced for leaf in LEAVES)}
    assert all(torch.equal(before.read(name), after.read(name)) for name in kept)
    manifest = verify(out)
    assert (manifest.precision, len(manifest.layers)) == ("w4a16", 3 * 7)
    whole = open_model(out, CPU)
    assert type(whole).__name__ == CLASSES[family_of(bundle)]
    found = read_stock(whole, open_processor(out), drawn(2), CPU)
    assert difference(read_bundle(out, drawn(2)).logits, found.logits)[0] < 1e-4


@pytest.mark.slow
def test_8_bits_are_within_their_bounds(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "w8a16"
    assert run_cli(main, [str(bundle), str(out), "--to", "w8a16", "--probes", "4"]) == 0
    assert read_manifest(out).parity.passed


@pytest.mark.slow
@torch.no_grad()
def test_layers_are_calibrated_on_what_they_get_in_the_whole_model(bundle: Path) -> None:
    """Features that are added between layers included."""
    model, (probe,) = open_model(bundle, CPU), drawn(1)
    inputs = _with_answer(model, open_processor(bundle), probe, CPU)
    decoder = model.get_decoder()
    (flowing,) = _first_inputs(model, decoder.layers[0], [inputs])
    assert len(flowing.levels) == (2 if family_of(bundle) == "qwen3_vl" else 0)
    for place, layer in enumerate(decoder.layers):
        flowing = flowing.behind(place, flowing.through(layer))
    expected = model.model(**inputs, use_cache=False).last_hidden_state
    assert torch.equal(decoder.norm(flowing.hidden), expected)


@pytest.mark.slow
def test_llama_cpp_is_refused_by_name(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(main, [str(bundle), str(tmp_path / "gguf"), "--to", "gguf"]) == 2
    said = capsys.readouterr().err
    assert f"{family_of(bundle)} is not written as gguf: its tower is not known there" in said
    assert not (tmp_path / "gguf").exists()
