"""What `sightline convert` is given is named, and what it cannot do with it is one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.common.errors import InputError, run_cli
from tools.convert.__main__ import main, weights_at


def test_a_directory_stands_for_the_one_file_in_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no \.gguf, no \.onnx and no config\.json"):
        weights_at(tmp_path)
    (tmp_path / "a.gguf").write_bytes(b"")
    assert weights_at(tmp_path) == tmp_path / "a.gguf"
    (tmp_path / "b.gguf").write_bytes(b"")
    with pytest.raises(InputError, match=r"name one of its files: a\.gguf, b\.gguf"):
        weights_at(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert weights_at(tmp_path) == tmp_path


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["nothing"], "a .gguf or .onnx file, or a directory, is needed"),
        (["a.gguf", "--image-size", "0"], "a number of pixels is needed"),
        (["a.gguf", "--image-size", "224"], "a.gguf is a language model, which has no pictures"),
        (["hub"], "a directory in Hugging Face format already"),
        (["hub", "--image-size", "224"], "llama is no vision encoder of clip, siglip, dinov2, vit"),
    ],
)
def test_wrong_input_is_one_line(
    words: list[str], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.gguf").write_bytes(b"")
    Path("hub").mkdir()
    Path("hub/config.json").write_text('{"model_type": "llama"}')
    Path("hub/model.safetensors").write_bytes(b"")
    assert run_cli(main, [words[0], "out", *words[1:]]) == 2
    said = capsys.readouterr().err
    assert line in said
    assert said.count("\n") == 1
    assert not Path("out").exists()
