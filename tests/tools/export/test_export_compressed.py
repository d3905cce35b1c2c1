"""Packed integers: what transformers reads is what was compared, vLLM's names are covered, and a budget holds."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import sightline
from models.bundle import read_manifest, verify
from models.common.errors import run_cli
from models.common.sharded import TensorFiles
from tests.support.checkpoints import write_finished
from tests.tools.conftest import beside, merge, run_of
from tools.export.__main__ import main
from tools.export.golden import drawn
from tools.export.packed import LEAVES, fused_name
from tools.export.quantize import main as quantize_main

GAP = "largest relative logit difference"


@pytest.fixture(scope="module")
def packed(trained_in_any: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "w4a16"
    assert run_cli(main, [str(beside(trained_in_any, "bundle")), str(out), "--to", "w4a16", "--force"]) == 0
    return out


def gap_of(bundle: Path) -> float:
    return next(check.value for check in read_manifest(bundle).parity.checks if check.name == GAP)


@pytest.mark.slow
def test_transformers_computes_what_the_report_has_compared(packed: Path) -> None:
    """Its own reader, whole in memory, against ours, one layer at a time; and its answers against our loader's."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from tools.export.parity import difference, read_bundle, read_stock, stock_inputs

    whole = AutoModelForImageTextToText.from_pretrained(packed, device_map="cpu", dtype="auto")
    processor = AutoProcessor.from_pretrained(packed, backend="pil")
    (probe,) = drawn(1)
    inputs = stock_inputs(processor, probe)
    ids = whole.generate(**inputs, max_new_tokens=6)[0, inputs["input_ids"].shape[1] :]  # unpacks it
    found = read_stock(whole, processor, drawn(2), torch.device("cpu"))
    answer = processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert sightline.load(packed, device="cpu").chat(probe.image, probe.question, max_new_tokens=6) == answer
    bound = 1e-4 if read_manifest(packed).recipe["stages"]["lora"]["engine"]["precision"] == "fp32" else 5e-2
    assert difference(read_bundle(packed, drawn(2)).logits, found.logits)[0] < bound


@pytest.mark.slow
def test_only_the_decoders_layers_are_packed(packed: Path, trained_in_any: dict[str, Any]) -> None:
    before, after = TensorFiles.open(beside(trained_in_any, "bundle")), TensorFiles.open(packed)
    replaced = {name for name in before if name not in after}
    assert {re.sub(r"layers\.\d+", "layers.N", name) for name in replaced} == {
        f"language_model.model.layers.N.{name}.weight"
        for name in (
            *(f"self_attn.{each}_proj" for each in "qkvo"),
            *(f"mlp.{each}_proj" for each in ("gate", "up", "down")),
        )
    }
    stems = [name.removesuffix("weight") for name in replaced]
    assert set(after) == {name for name in before if name not in replaced} | {
        f"{stem}{leaf}" for stem in stems for leaf in LEAVES
    }
    kept = [name for name in before if name not in replaced]
    assert all(torch.equal(before.read(name), after.read(name)) for name in kept)
    manifest = verify(packed)
    assert manifest.precision == "w4a16"
    assert len(manifest.layers) == 14


@pytest.mark.slow
def test_it_is_nearer_than_nf4(packed: Path, trained_in_any: dict[str, Any], tmp_path: Path) -> None:
    """Layer for layer on the same inputs; NF4 has 4.1 bits a weight, this 4.25 or 4.5."""
    bundle = beside(trained_in_any, "bundle")
    assert run_cli(quantize_main, [str(bundle), str(tmp_path / "nf4"), "--to", "nf4", "--force"]) == 0
    ours = {layer.name: layer.error for layer in read_manifest(packed).layers}
    theirs = {layer.name: layer.error for layer in read_manifest(tmp_path / "nf4").layers}
    assert set(ours) == set(theirs)
    assert all(ours[name] < theirs[name] for name in ours)


@pytest.mark.slow
def test_a_budget_keeps_whole_what_vllm_computes_as_one(trained: dict[str, Any], tmp_path: Path) -> None:
    """q, k, v in one layer and gate, up in one: all of them are packed or none is."""
    from transformers import AutoModelForImageTextToText

    bundle, out = beside(trained, "bundle"), tmp_path / "tight"
    assert run_cli(main, [str(bundle), str(tmp_path / "free"), "--to", "w4a16", "--force"]) == 0
    budget = 0.8 * gap_of(tmp_path / "free")
    assert run_cli(main, [str(bundle), str(out), "--to", "w4a16", "--budget", str(budget), "--force"]) == 0
    assert gap_of(out) <= budget
    whole = {layer.name for layer in read_manifest(out).layers if layer.precision == "fp32"}
    assert 0 < len(whole) < 14
    by_fused: dict[str, set[bool]] = {}
    for layer in read_manifest(out).layers:
        by_fused.setdefault(fused_name(layer.name), set()).add(layer.name in whole)
    assert all(len(kinds) == 1 for kinds in by_fused.values())
    model = AutoModelForImageTextToText.from_pretrained(out, device_map="cpu")
    ignored = [each.removeprefix("re:") for each in model.config.quantization_config.quantization_config.ignore]
    for layer in read_manifest(out).layers:
        has_scale = hasattr(model.get_submodule(layer.name), "weight_scale")
        assert has_scale == (layer.name not in whole), layer.name
        in_vllm = f"language_model.model.{layer.name.removeprefix('model.language_model.')}"
        assert any(re.match(each, in_vllm) for each in ignored) == (layer.name in whole)
    assert any(re.match(each, "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj") for each in ignored)


@pytest.mark.slow
def test_8_bits_are_within_their_bounds(trained_in_any: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "w8a16"
    assert run_cli(main, [str(beside(trained_in_any, "bundle")), str(out), "--to", "w8a16"]) == 0
    assert verify(out).parity.passed
    card = (out / "README.md").read_text()
    assert "exported as `w8a16`" in card
    assert "compressed-tensors" in card


@pytest.mark.slow
def test_what_cannot_be_packed_is_refused(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_cli(main, [str(packed), str(tmp_path / "again"), "--to", "w4a16"]) == 2
    assert "it is w4a16 already; export the merged bundle" in capsys.readouterr().err
    recipe = run_of(tmp_path, width=48)
    write_finished(recipe, "lora")
    assert merge(recipe, tmp_path / "bundle", "--probes", "1") == 0
    words = [str(tmp_path / "bundle"), str(tmp_path / "out"), "--to", "w4a16"]
    assert run_cli(main, words) == 2
    assert "layers with 48, 96 inputs cannot be packed in groups of 32; `sightline quantize" in capsys.readouterr().err
    import tools.export.packed as module

    monkeypatch.setattr(module, "find_spec", lambda _: None)
    assert run_cli(main, words) == 2
    assert "pip install 'sightline[w4a16]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert json.loads((packed / "config.json").read_text())["quantization_config"]["format"] == "pack-quantized"
