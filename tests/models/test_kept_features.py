"""Features on disk are what the encoder computes, bit for bit, whatever happens to the files."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.common.errors import InputError
from models.kept_features import KeptFeatures
from models.vision import VisionEncoder

ENTRY_BYTES = 4 * 8 * 4 + 16
"""Four patches of width 8 in fp32, and a digest."""


def make_encoder(layer: int = -2, seed: int = 0, dtype: torch.dtype = torch.float32) -> VisionEncoder:
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(seed)
    shape: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 3, "image_size": 16}
    model = ViTModel(ViTConfig(**shape, num_attention_heads=2, patch_size=8)).eval()
    encoder = VisionEncoder(model.to(dtype), feature_layer=layer, num_skipped_tokens=1)
    return encoder.requires_grad_(False)


class Calls:
    """Counts the pictures that an encoder computes."""

    def __init__(self, encoder: VisionEncoder) -> None:
        self.num_pictures = 0
        encoder.model.register_forward_pre_hook(self._count)

    def _count(self, _model: Any, inputs: tuple[Tensor]) -> None:
        self.num_pictures += len(inputs[0])


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("??/*"))


def pixels(*seeds: int) -> Tensor:
    return torch.stack([torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_picture_seen_again_is_read_and_the_same_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    expected = make_encoder(dtype=dtype)(pixels(1, 2, 3))
    encoder = make_encoder(dtype=dtype)
    encoder.keep_features(tmp_path, 1.0)
    calls = Calls(encoder)
    assert torch.equal(encoder(pixels(1, 2, 3)), expected)
    first = calls.num_pictures
    read = encoder(pixels(3, 1, 2))
    assert torch.equal(read, expected[[2, 0, 1]])
    assert (read.stride(), read.storage_offset()) == (expected.stride(), expected.storage_offset())
    assert calls.num_pictures == first, "everything was on disk"
    assert torch.equal(encoder(pixels(1, 2, 4))[:2], expected[:2])
    assert calls.num_pictures == first + 3, "one was not, so the micro-batch was computed as it would be without"
    again = make_encoder(dtype=dtype)
    again.keep_features(tmp_path, 1.0)
    assert torch.equal(again(pixels(1, 2, 3)), expected)


def test_in_another_dtype_than_it_had_the_encoder_computes(tmp_path: Path) -> None:
    """Its entries are known by the weights that it had."""
    encoder = make_encoder(dtype=torch.bfloat16)
    encoder.keep_features(tmp_path, 1.0)
    encoder.float()
    encoder(pixels(1, 2))
    assert not entries(tmp_path)
    encoder.bfloat16()
    encoder(pixels(1, 2))
    assert len(entries(tmp_path)) == 2


def test_whatever_moves_the_numbers_has_entries_of_its_own(tmp_path: Path) -> None:
    others = [make_encoder(), make_encoder(layer=-1), make_encoder(seed=1), make_encoder(dtype=torch.bfloat16)]
    for number, encoder in enumerate(others, start=1):
        encoder.keep_features(tmp_path, 1.0)
        encoder(pixels(1, 2))
        assert len(entries(tmp_path)) == 2 * number
    others[0](pixels(1))  # alone, which kernels may compute otherwise
    assert len(entries(tmp_path)) == 9


@pytest.mark.parametrize("damage", ["cut", "changed", "exchanged", "removed"])
def test_a_damaged_entry_is_computed_again_and_mended(tmp_path: Path, damage: str) -> None:
    encoder = make_encoder()
    encoder.keep_features(tmp_path, 1.0)
    expected = encoder(pixels(1, 2)).clone()
    before = {file: file.read_bytes() for file in entries(tmp_path)}
    one, other = before
    if damage == "removed":
        one.unlink()
    else:
        spoilt = bytes([before[one][0] ^ 1]) + before[one][1:]
        one.write_bytes({"cut": before[one][:-20], "changed": spoilt, "exchanged": before[other]}[damage])
    assert torch.equal(encoder(pixels(1, 2)), expected)
    assert {file: file.read_bytes() for file in entries(tmp_path)} == before


def test_the_limit_holds_for_all_who_share_the_directory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    limit_gb = 3.5 * ENTRY_BYTES / 1e9
    encoders = [make_encoder(), make_encoder(seed=1)]
    for encoder in encoders:
        encoder.keep_features(tmp_path, limit_gb)
    with caplog.at_level(logging.WARNING):
        for encoder in encoders:
            encoder(pixels(1, 2))
        encoders[1](pixels(3, 4))
    assert sum(file.stat().st_size for file in entries(tmp_path)) == 3 * ENTRY_BYTES
    assert len(caplog.messages) == 1
    assert "no more features are kept" in caplog.text


def test_what_a_killed_process_left_is_removed_and_the_rest_counted(tmp_path: Path) -> None:
    encoder = make_encoder()
    encoder.keep_features(tmp_path, 1.0)
    encoder(pixels(1, 2))
    (entries(tmp_path)[0].parent / ".half.1.tmp").write_bytes(b"half")
    (tmp_path / "bytes").write_text("nonsense")
    encoder(pixels(3, 4))
    assert int((tmp_path / "bytes").read_text()) == 4 * ENTRY_BYTES
    assert not list(tmp_path.glob("??/.*"))


def test_a_full_disk_costs_the_entry_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = make_encoder()
    expected = encoder(pixels(1, 2))
    encoder.keep_features(tmp_path, 1.0)

    def full(file: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device", str(file))

    monkeypatch.setattr("models.kept_features.write_bytes", full)
    assert torch.equal(encoder(pixels(1, 2)), expected)
    assert "No space left" in caplog.text


def test_features_that_depend_on_the_pictures_beside_are_refused(tmp_path: Path) -> None:
    kept = KeptFeatures.open(tmp_path, 1.0, torch.nn.Linear(1, 1))
    with pytest.raises(InputError, match="leave keep_features out"):
        kept.features(pixels(1, 2), lambda given: given.flatten(2).cumsum(0))


def test_a_directory_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        make_encoder().keep_features(tmp_path / "file", 1.0)
