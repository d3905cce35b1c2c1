"""GGUF: what llama.cpp computes is what stock transformers does; what it would compute otherwise is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.common.errors import run_cli
from models.common.sharded import TensorFiles
from tests.support.backbones import make_language, make_sentencepiece, make_siglip, make_tokenizer
from tests.support.checkpoints import write_finished
from tests.tools.conftest import beside, merge, run_of
from tools.export.__main__ import main
from tools.export.gguf_language import chat_template, interleaved
from tools.export.gguf_tokenizer import adds_a_space, piece_scores, pre_tokenizer


def bundle_of(folder: Path, language: str, projector: str = "mlp", precision: str = "fp32", layer: int = -2) -> Path:
    recipe = run_of(folder, language=language, projector=projector, tied=language == "qwen2")
    recipe["model"]["vision"] = {"kind": "siglip", "path": str(make_siglip(folder / "siglip")), "feature_layer": layer}
    recipe["stages"]["lora"]["engine"]["precision"] = precision
    write_finished(recipe, "lora")
    assert merge(recipe, folder / "bundle", "--probes", "1") == 0
    return folder / "bundle"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle_of(tmp_path_factory.mktemp("llama"), "llama")


def checks_of(out: Path) -> dict[str, Any]:
    return {check["name"]: check for check in json.loads((out / "parity.json").read_text())["checks"]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("language", "projector", "precision", "layer"),
    [("llama", "linear", "fp32", -1), ("qwen2", "mlp", "fp32", -2), ("qwen3", "mlp", "bf16", 1)],
)
def test_llama_cpp_computes_what_transformers_does(
    tmp_path: Path, language: str, projector: str, precision: str, layer: int
) -> None:
    pytest.importorskip("xllamacpp", reason="llama.cpp is not installed (the extra `gguf`)")
    bundle, out = bundle_of(tmp_path, language, projector, precision, layer), tmp_path / "gguf"
    assert run_cli(main, [str(bundle), str(out), "--to", "gguf"]) == 0
    checks = checks_of(out)
    assert checks["prompts of another length"]["value"] == 0
    assert checks["largest difference of a log probability"]["value"] < {"fp32": 0.05, "bf16": 0.2}[precision]
    assert "exported as `gguf`" in (out / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("legacy", [True, False])
def test_a_base_with_tokenizer_model_alone_goes_through_merge_to_llama_cpp(tmp_path: Path, legacy: bool) -> None:
    """SentencePiece's BPE, as Vicuna has it, in both ways that transformers puts spaces: prompts are as long."""
    pytest.importorskip("sentencepiece", reason="SentencePiece is not installed")
    pytest.importorskip("xllamacpp", reason="llama.cpp is not installed (the extra `gguf`)")
    recipe = run_of(tmp_path, language="llama")
    shutil.rmtree(tmp_path / "language")
    make_language(tmp_path / "language", tokenizer=make_sentencepiece(tmp_path / "language", legacy=legacy))
    assert not (tmp_path / "language" / "tokenizer.json").exists()
    recipe["model"]["vision"] = {"kind": "siglip", "path": str(make_siglip(tmp_path / "siglip"))}
    recipe["stages"]["lora"]["data"]["template"] = {"kind": "vicuna_v1"}
    write_finished(recipe, "lora")
    assert merge(recipe, tmp_path / "bundle", "--probes", "1") == 0
    assert run_cli(main, [str(tmp_path / "bundle"), str(tmp_path / "gguf"), "--to", "gguf"]) == 0
    checks = checks_of(tmp_path / "gguf")
    assert checks["prompts of another length"]["value"] == 0
    assert checks["largest difference of a log probability"]["value"] < 0.05


@pytest.mark.slow
def test_a_wrong_weight_is_noticed(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of queries in transformers' order: llama.cpp opens the file, and computes something else."""
    pytest.importorskip("xllamacpp", reason="llama.cpp is not installed (the extra `gguf`)")
    import tools.export.gguf_language as module

    monkeypatch.setattr(module, "interleaved", lambda value, _: value)
    assert run_cli(main, [str(llama), str(tmp_path / "gguf"), "--to", "gguf"]) == 2
    assert "largest difference of a log probability is" in capsys.readouterr().err
    assert not (tmp_path / "gguf").exists()


@pytest.fixture(scope="module")
def written(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files without llama.cpp, as on a machine that has none."""
    import tools.export.llama_cpp as module

    out = tmp_path_factory.mktemp("written") / "gguf"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "is_installed", lambda: False)
        assert run_cli(main, [str(llama), str(out), "--to", "gguf"]) == 0
    return out


@pytest.mark.slow
def test_each_tensor_is_the_bundles(llama: Path, written: Path) -> None:
    from gguf import GGUFReader

    files = TensorFiles.open(llama)
    stored = {
        tensor.name: np.array(tensor.data) for file in written.glob("*.gguf") for tensor in GGUFReader(file).tensors
    }
    for ours, theirs in (
        ("language_model.model.embed_tokens.weight", "token_embd.weight"),
        ("language_model.model.layers.1.mlp.down_proj.weight", "blk.1.ffn_down.weight"),
        ("language_model.model.norm.weight", "output_norm.weight"),
        ("vision_tower.vision_model.encoder.layers.1.mlp.fc1.bias", "v.blk.1.ffn_up.bias"),
        ("vision_tower.vision_model.embeddings.patch_embedding.weight", "v.patch_embd.weight"),
        ("multi_modal_projector.linear_2.weight", "mm.2.weight"),
    ):
        assert np.array_equal(stored[theirs].reshape(-1), files.read(ours).numpy().reshape(-1)), theirs
    query = files.read("language_model.model.layers.0.self_attn.q_proj.weight")
    assert np.array_equal(stored["blk.0.attn_q.weight"], interleaved(query, 4).numpy())
    assert "v.blk.2.attn_q.weight" not in stored, "a layer behind the feature layer"
    note = checks_of(written)["opened by llama.cpp"]["note"]
    assert "xllamacpp is not installed" in note


def test_rows_are_pairs_of_a_heads_halves() -> None:
    rows = torch.arange(8.0)[:, None]
    assert interleaved(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_pre_tokenizers_by_llama_cpps_names() -> None:
    stored = json.loads(make_tokenizer().backend_tokenizer.to_str())
    assert pre_tokenizer(stored) == "gpt-2"
    digits = {"type": "Digits", "individual_digits": True}
    stored["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, stored["pre_tokenizer"]]}
    assert pre_tokenizer(stored) == "smollm"
    assert pre_tokenizer({"pre_tokenizer": {"type": "Metaspace"}}) is None
    assert pre_tokenizer({"pre_tokenizer": None}) is None


def test_pieces_score_by_the_order_of_their_merges() -> None:
    vocabulary = {piece: place for place, piece in enumerate(["a", "b", "c", "ab", "bc", "abc"])}
    merges = ["b c", "a b", "ab c", "a bc"]
    assert piece_scores({"vocab": vocabulary, "merges": merges}) == {"bc": 0.0, "ab": -1.0, "abc": -2.0}
    assert piece_scores({"vocab": vocabulary, "merges": merges[:3]}) is None, "llama.cpp would merge a and bc, too"
    assert piece_scores({"vocab": vocabulary, "merges": ["a b", "ab c", "b c", "a bc"]}) is None, (
        "in no order of pieces"
    )


def test_where_a_space_is_put_in_front() -> None:
    first = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    assert adds_a_space({"pre_tokenizer": first}) is False
    assert adds_a_space({"pre_tokenizer": {**first, "prepend_scheme": "always"}}) is True
    assert adds_a_space({"pre_tokenizer": {**first, "split": True}}) is None
    assert adds_a_space({"pre_tokenizer": first, "normalizer": {"type": "Lowercase"}}) is None
    assert adds_a_space({"pre_tokenizer": None, "normalizer": {"type": "NFC"}}) is None


def test_a_line_feed_stands_behind_an_image() -> None:
    import jinja2

    from data_pipeline.templates import content_jinja

    template = "{%- for message in messages -%}" + content_jinja("") + "{%- endfor -%}"
    given = jinja2.Template(chat_template(template)).render(messages=[{"content": "<__media__>What?"}])
    assert given == "<__media__>\nWhat?"


def test_a_tower_with_a_class_token_is_refused_by_name(
    trained: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(main, [str(beside(trained, "bundle")), str(tmp_path / "gguf"), "--to", "gguf"]) == 2
    said = capsys.readouterr().err
    assert "clip_vision_model cannot be exported to gguf: llama.cpp's LLaVA graph puts a class token" in said
    assert "SigLIP" in said
    assert not (tmp_path / "gguf").exists()


def test_a_tokenizer_that_splits_otherwise_is_refused(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import tools.export.gguf_tokenizer as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PRE_TOKENIZERS", {"other": "other"})
        assert run_cli(main, [str(llama), str(tmp_path / "gguf"), "--to", "gguf"]) == 2
    assert "its tokenizer cannot be exported to gguf here" in capsys.readouterr().err
