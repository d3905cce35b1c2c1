"""Safetensors in and out one tensor at a time, against the safetensors library."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.common.errors import InputError
from models.common.sharded import INDEX, ShardedWriter, TensorFiles, read_tensors
from tests.support.damage import TENSORS as DAMAGE

TENSORS = {
    "a.weight": torch.arange(600, dtype=torch.float32).view(20, 30),
    "b.odd": torch.arange(7, dtype=torch.uint8),
    "c.half": torch.randn(33, 5).to(torch.bfloat16),
    "d.scalar": torch.tensor(3, dtype=torch.int64),
    "e.none": torch.empty(0, 4),
    "f.flags": torch.tensor([True, False, True]),
    "g.weight": torch.randn(40, 30, dtype=torch.float64),
}


def write(folder: Path, max_bytes: int) -> Path:
    writer = ShardedWriter(folder, max_bytes=max_bytes)
    for name, value in TENSORS.items():
        writer.add(name, value)
    writer.close()
    return folder


@pytest.mark.parametrize("max_bytes", [10**9, 3000, 1])
def test_what_is_written_the_library_reads_and_so_do_we(tmp_path: Path, max_bytes: int) -> None:
    write(tmp_path, max_bytes)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) == 1) == (max_bytes == 10**9)
    by_library = {name: value for file in files for name, value in load_file(file).items()}
    by_us = dict(read_tensors(tmp_path))
    assert set(by_us) == set(by_library) == set(TENSORS)
    for name, value in TENSORS.items():
        for found in (by_us[name], by_library[name]):
            assert found.dtype == value.dtype
            assert torch.equal(found, value)
            assert found.shape == value.shape
    if len(files) > 1:
        index = json.loads((tmp_path / INDEX).read_text())
        assert set(index["weight_map"]) == set(TENSORS)
        assert {file.name for file in files} == set(index["weight_map"].values())


def test_what_the_library_writes_we_read(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    files = TensorFiles.open(tmp_path)
    assert all(torch.equal(files.read(name), value) for name, value in TENSORS.items())
    with pytest.raises(InputError, match=r"no tensor h\.weight"):
        files.read("h.weight")


def test_a_model_directory_of_transformers_is_read_as_transformers_does(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **shape))
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    assert (tmp_path / INDEX).is_file()
    files = TensorFiles.open(tmp_path)
    assert set(files) == set(model.state_dict())
    assert all(torch.equal(files.read(name), value) for name, value in model.state_dict().items())


def test_a_missing_or_truncated_or_foreign_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="pickles are never opened"):
        TensorFiles.open(tmp_path)
    write(tmp_path, 3000)
    last = sorted(tmp_path.glob("*.safetensors"))[-1]
    content = last.read_bytes()
    for size in (4, 40, len(content) - 1):
        last.write_bytes(content[:size])
        with pytest.raises(InputError, match=f"{last.name}: "):
            TensorFiles.open(tmp_path)
    last.write_bytes((10).to_bytes(8, "little") + b"no json at all")
    with pytest.raises(InputError, match=f"{last.name}: no safetensors file"):
        TensorFiles.open(tmp_path)
    last.unlink()
    with pytest.raises(InputError, match=f"{last.name}: missing"):
        TensorFiles.open(tmp_path)


def test_writing_holds_no_more_than_a_tensor(tmp_path: Path) -> None:
    """64 tensors of 8 MB through the writer and the reader: the process grows by a few of them, not by 512 MB."""
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    writer = ShardedWriter(tmp_path)
    for number in range(64):
        writer.add(f"t{number}", torch.full((2_000_000,), float(number)))
    writer.close()
    assert [int(value[-1]) for _, value in read_tensors(tmp_path)] == list(range(64))
    grown_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kb < 100_000


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_header_is_one_line_with_the_file(tmp_path: Path, damage: str) -> None:
    save_file({"a": torch.ones(2, 4), "b": torch.zeros(3)}, tmp_path / "model.safetensors")
    DAMAGE[damage](tmp_path / "model.safetensors")
    with pytest.raises(InputError) as caught:
        TensorFiles.open(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'model.safetensors'}: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(tmp_path))


@pytest.mark.parametrize("weight_map", [{"a": "../x.safetensors"}, {"a": "/x.safetensors"}, {"a": 3}, [], "x", None])
def test_an_index_names_files_right_there(tmp_path: Path, weight_map: object) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InputError, match=f"^{tmp_path / INDEX}: weight_map"):
        TensorFiles.open(tmp_path)
