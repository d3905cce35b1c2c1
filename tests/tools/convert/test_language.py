"""A language model written as GGUF comes back: the same logits, tokens and chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from models.common.errors import run_cli
from models.languages.pretrained import PretrainedLanguage
from tests.support.backbones import SENTENCES, make_language
from tests.support.foreign import TEMPLATE, write_gguf
from tools.convert.__main__ import main

pytest.importorskip("gguf")


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def language(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_language(tmp_path_factory.mktemp("language") / "before", tied=request.param)


@pytest.mark.slow
def test_it_says_what_it_said_before(language: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_gguf(language, tmp_path / "tiny.gguf")
    assert run_cli(main, [str(file), str(tmp_path / "out")]) == 0
    before = AutoModelForCausalLM.from_pretrained(language, dtype=torch.float32)
    found = PretrainedLanguage(path=str(tmp_path / "out")).load_model(torch.float32)
    num_tensors = len(list(before.named_parameters()))
    assert f"tiny.gguf: {num_tensors} tensors" in capsys.readouterr().out
    quantized = "model.layers.0.mlp.up_proj.weight"
    states: list[dict[str, Any]] = [dict(model.named_parameters()) for model in (before, found)]
    for name, value in states[0].items():
        if name == quantized:  # Q8_0: 127 levels on each side of the largest of 32 neighbours
            assert (value - states[1][name]).abs().max() <= value.abs().max() / 127
        else:
            assert torch.equal(value, states[1][name]), name
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (language, tmp_path / "out")]
    for text in (*SENTENCES, "<|im_start|>user\nWhat?<|im_end|>"):
        assert tokenizers[0](text)["input_ids"] == tokenizers[1](text)["input_ids"]
    assert tokenizers[1].chat_template == TEMPLATE
    assert tokenizers[1].eos_token == "<|im_end|>"
    config = (tmp_path / "out" / "config.json").read_text()
    assert "quantization_config" not in config
    assert str(tmp_path) not in config


def test_a_missing_tensor_is_one_line(language: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    file = write_gguf(language, tmp_path / "tiny.gguf", without=name)
    assert run_cli(main, [str(file), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert f"its weights lack {name}" in said
    assert not (tmp_path / "out").exists()


def test_what_is_no_gguf_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"not a model")
    assert run_cli(main, [str(tmp_path), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "broken.gguf: transformers cannot read this GGUF" in said
    assert said.count("\n") == 1
