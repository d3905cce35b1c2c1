"""Weights in torch's own files: read as safetensors are, and never anything but tensors."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from models.common.errors import InputError
from models.common.pickled import INDEX, open_file, open_weights
from models.projectors.linear import LinearProjector
from models.projectors.mlp import MlpProjector
from tests.support.published import make_published


def test_tensors_are_those_that_torch_saved(tmp_path: Path) -> None:
    whole = torch.randn(7, 5)
    tensors = {"a": whole, "b": torch.arange(3, dtype=torch.int64), "c": whole.bfloat16(), "row": whole[2]}
    torch.save({"a": tensors["a"], "b": tensors["b"]}, tmp_path / "pytorch_model-1.bin")
    torch.save({"c": tensors["c"], "row": tensors["row"]}, tmp_path / "pytorch_model-2.bin")
    torch.save({"never": "weights"}, tmp_path / "training_args.bin")
    for has_index in (False, True):
        if has_index:
            names = dict.fromkeys("ab", "pytorch_model-1.bin") | dict.fromkeys(("c", "row"), "pytorch_model-2.bin")
            (tmp_path / INDEX).write_text(json.dumps({"weight_map": names}))
        files = open_weights(tmp_path)
        assert set(files) == set(tensors)
        for name, value in tensors.items():
            assert torch.equal(files.read(name), value), name
            assert files.shape(name) == value.shape


class Evil:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("/tmp/was_run"),)


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (Evil(), "not unpickled"),
        ({"a": Evil()}, "not unpickled"),
        ([torch.ones(2)], "where tensors by name are expected"),
        ({"a": 3}, "a is int"),
        ({"a": torch.ones(4, 4).T}, "not in one piece"),
    ],
)
def test_what_is_no_weights_is_refused_and_not_run(tmp_path: Path, value: Any, named: str) -> None:
    file = tmp_path / "weights.bin"
    torch.save(value, file)
    with pytest.raises(InputError, match=named):
        open_file(file)


def test_files_that_are_damaged_are_named(tmp_path: Path) -> None:
    file = tmp_path / "weights.bin"
    torch.save({"a": torch.ones(1000)}, file)
    content = file.read_bytes()
    for damaged in (b"", content[:100], content[: len(content) // 2], b"\x80\x04" + pickle.dumps("x")):
        file.write_bytes(damaged)
        with pytest.raises(InputError, match=r"weights\.bin"):
            open_file(file)
    with pytest.raises(InputError, match="no such file"):
        open_file(tmp_path / "absent.bin")


@pytest.mark.parametrize("ending", [".bin", ".safetensors"])
@pytest.mark.parametrize("prefix", ["model.mm_projector.", "mm_projector.", "multi_modal_projector."])
def test_a_projector_starts_from_llavas_file(tmp_path: Path, ending: str, prefix: str) -> None:
    from safetensors.torch import save_file

    own = prefix.startswith("multi")
    first, second = ("linear_1", "linear_2") if own else ("0", "2")
    shapes = {f"{first}.weight": (6, 4), f"{first}.bias": (6,), f"{second}.weight": (6, 6), f"{second}.bias": (6,)}
    values = {f"{prefix}{name}": torch.randn(shape) for name, shape in shapes.items()}
    file = tmp_path / f"projector{ending}"
    written = {**values, "model.vision_tower.x": torch.ones(1)}
    torch.save(written, file) if ending == ".bin" else save_file(written, file)
    config = MlpProjector(weights=str(file))
    projector = config.build(4, 6)
    config.load_pretrained(projector)
    for found, expected in zip(projector.parameters(), values.values(), strict=True):
        assert torch.equal(found, expected)
    with pytest.raises(InputError, match=r"not the weights of this projector: linear\.bias, linear\.weight missing"):
        LinearProjector(weights=str(file)).load_pretrained(LinearProjector().build(4, 6))
    with pytest.raises(InputError, match=r"has shape \[6, 4\], tower and language model want \[6, 5\]"):
        config.load_pretrained(config.build(5, 6))


def test_a_linear_projector_starts_from_the_first_llavas_file(tmp_path: Path) -> None:
    weight, bias = torch.randn(6, 4), torch.randn(6)
    torch.save({"model.mm_projector.weight": weight, "model.mm_projector.bias": bias}, tmp_path / "mm_projector.bin")
    config = LinearProjector(weights=str(tmp_path / "mm_projector.bin"))
    projector: Any = config.build(4, 6)
    config.load_pretrained(projector)
    assert torch.equal(projector.linear.weight, weight)
    assert torch.equal(projector.linear.bias, bias)


def test_a_published_model_may_have_its_weights_as_bin_only(tmp_path: Path) -> None:
    from models.build import build_vlm, read_metadata
    from models.common.source import digest_of
    from models.config import SOURCES

    folder = make_published(tmp_path / "llava")
    source: Any = SOURCES.decode({"kind": "published", "path": str(folder)})
    facts = read_metadata(source, 128)
    expected = build_vlm(source, facts, frozen_dtype=torch.float32, seed=0).state_dict()
    files = open_weights(folder)
    torch.save({name: files.read(name) for name in files}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    found = build_vlm(source, facts, frozen_dtype=torch.float32, seed=0).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    before = digest_of(folder)
    torch.save({name: open_weights(folder).read(name) + 1 for name in files}, folder / "other.bin")
    (folder / "other.bin").replace(folder / "pytorch_model.bin")
    assert digest_of(folder) != before
