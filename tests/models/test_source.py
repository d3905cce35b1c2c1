"""A model directory's identity is its weights, and its tokenizer opens or says what is missing."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest

from models.common.errors import InputError
from models.common.source import check_loaded, digest_of, directory_of
from models.languages.text import load_tokenizer
from tests.support.paths import data, needs_data

has_sentencepiece = importlib.util.find_spec("sentencepiece") is not None


def test_weights_as_bin_count_where_there_are_no_safetensors(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"one")
    before = digest_of(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"another")
    assert digest_of(tmp_path) != before
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    with_both = digest_of(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    assert digest_of(tmp_path) == with_both


@pytest.mark.parametrize(("name", "form"), [("m.gguf", "GGUF"), ("m.onnx", "ONNX"), ("onnx/model.onnx", "ONNX")])
@pytest.mark.parametrize("has_config", [False, True])
def test_weights_of_another_format_say_what_they_are_and_what_to_do(
    name: str, form: str, has_config: bool, tmp_path: Path
) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"")
    if has_config:
        (tmp_path / "config.json").write_text("{}")
    command = f"sightline convert {tmp_path / name} OUT"
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(InputError) as caught:
            directory_of(str(path))
        assert f"{path}: weights as {form}" in str(caught.value)
        assert str(caught.value).endswith(command)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert directory_of(str(tmp_path)) == tmp_path  # beside weights that transformers loads they are no matter


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"model\.safetensors: a file; a model directory"):
        directory_of(str(tmp_path / "model.safetensors"))


def test_weights_that_would_be_drawn_at_random_are_named() -> None:
    check_loaded("here", {"missing_keys": {"pooler.dense.bias"}}, unused=("pooler.",))
    missing = {"pooler.dense.bias", *(f"layer.{number}" for number in range(5))}
    with pytest.raises(InputError, match=r"here: its weights lack layer\.0, layer\.1, layer\.2 and 2 more"):
        check_loaded("here", {"missing_keys": missing}, unused=("pooler.",))


@pytest.fixture
def vicuna(tmp_path: Path) -> Path:
    shutil.copy(data("tokenizers", "llama2", "tokenizer.model"), tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    names = '"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"'
    (tmp_path / "tokenizer_config.json").write_text(
        f'{{"tokenizer_class": "LlamaTokenizer", "legacy": false, {names}}}'
    )
    return tmp_path


@needs_data
@pytest.mark.skipif(not has_sentencepiece, reason="sentencepiece is not installed here")
def test_a_directory_with_tokenizer_model_alone_opens(vicuna: Path) -> None:
    assert len(load_tokenizer(str(vicuna))) == 32_001


@needs_data
def test_without_sentencepiece_one_line_says_what_to_install(vicuna: Path) -> None:
    if has_sentencepiece:
        pytest.skip("sentencepiece is installed here")
    with pytest.raises(InputError, match=r"tokenizer\.model alone, which needs `pip install sentencepiece protobuf`"):
        load_tokenizer(str(vicuna))
