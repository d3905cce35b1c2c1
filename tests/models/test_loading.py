"""What transformers loads from a directory is what the directory holds, or one line says why not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from models.common.errors import InputError
from models.encoders.pretrained import TransformersVision
from models.languages.pretrained import PretrainedLanguage
from models.languages.text import load_tokenizer
from models.loading import opening
from tests.support.backbones import make_clip, make_language
from tests.support.damage import DOCUMENTS, MISSING, TENSORS


def load(part: str, folder: Path) -> object:
    if part == "vision":
        return TransformersVision(kind="clip", path=str(folder)).load_model(torch.float32)
    return PretrainedLanguage(path=str(folder)).load_model(torch.float32)


@pytest.fixture(params=["vision", "language"])
def part(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    return request.param, (make_clip if request.param == "vision" else make_language)(tmp_path / request.param)


def test_a_whole_part_loads(part: tuple[str, Path]) -> None:
    assert load(*part) is not None


@pytest.mark.parametrize("damage", [*TENSORS, *MISSING])
def test_weights_that_are_damaged_missing_or_of_another_shape(part: tuple[str, Path], damage: str) -> None:
    name, folder = part
    {**TENSORS, **MISSING}[damage](folder / "model.safetensors")
    with pytest.raises(InputError) as caught:
        load(name, folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", DOCUMENTS)
def test_a_config_json_that_is_none(part: tuple[str, Path], case: str) -> None:
    name, folder = part
    (folder / "config.json").write_text(DOCUMENTS[case])
    with pytest.raises(InputError) as caught:
        load(name, folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"), [("image_size", None), ("image_size", "x"), ("patch_size", []), ("num_hidden_layers", "2")]
)
def test_a_value_of_the_encoder_s_config_that_is_missing_or_wrong(tmp_path: Path, key: str, value: object) -> None:
    from models.spec import CropImage

    folder = make_clip(tmp_path / "vision")
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config.get("vision_config", config)[key] = value
    file.write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"config\.json: a value is not of its kind"):
        TransformersVision(kind="clip", path=str(folder)).image_spec(CropImage())


@pytest.mark.parametrize("case", DOCUMENTS)
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_that_is_none(tmp_path: Path, name: str, case: str) -> None:
    folder = make_language(tmp_path / "language")
    (folder / name).write_text(DOCUMENTS[case])
    if name == "tokenizer_config.json" and case in ("empty object", "deep within"):
        return  # nothing that is needed stands there
    with pytest.raises(InputError, match=f"^{folder}: its tokenizer cannot be opened: "):
        load_tokenizer(str(folder))


def test_memory_that_is_full_is_no_fault_of_the_directory(tmp_path: Path) -> None:
    with pytest.raises(MemoryError), opening(tmp_path, "is damaged", "fetch it again"):
        raise MemoryError
