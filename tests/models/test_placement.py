"""Pretrained weights go where they will be used, one at a time: to the device, a rank's share, 4 or 8 bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.encoders.base import EncoderConfig
from models.encoders.pretrained import TransformersVision
from models.languages.base import LanguageConfig
from models.languages.pretrained import PretrainedLanguage
from models.placement import (
    Division,
    Placement,
    cast,
    divide,
    divide_all,
    gathered,
    gathering,
    local_slice,
    placing,
    share_of,
)
from models.published.language import PublishedLanguage
from tests.support.backbones import make_clip, make_language
from tests.support.live_bytes import LiveBytes
from tests.support.published import make_published

CPU = torch.device("cpu")


def alone(values: Tensor) -> Tensor:
    return values


def split(rank: int, world_size: int) -> Placement:
    """A rank whose shares nobody gathers."""
    return Placement(CPU, Division(rank, world_size, CPU, alone))


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    make_clip(folder / "vision")
    make_language(folder / "language", width=128, num_layers=8)
    make_language(folder / "tied", tied=True)
    return folder


def load(parts: Path, name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    config: EncoderConfig | LanguageConfig
    if name == "vision":
        config = TransformersVision(kind="clip", path=str(parts / name))
    else:
        config = PretrainedLanguage(path=str(parts / name))
    model: nn.Module = config.load_model(dtype)
    return model


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[LiveBytes]:
    """Every tensor is read in this thread, where it is counted."""
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
    with LiveBytes() as live:
        yield live


def num_bytes(model: nn.Module) -> int:
    return sum(each.numel() * each.element_size() for each in model.parameters())


@pytest.mark.parametrize("name", ["vision", "language", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ranks_shares_are_the_model(parts: Path, name: str, dtype: torch.dtype) -> None:
    whole = dict(load(parts, name, dtype).named_parameters())
    pieces: dict[str, list[Tensor]] = {key: [] for key in whole}
    for rank in range(3):
        with placing(split(rank, 3)):
            divided = load(parts, name, dtype)
            divide_all(divided)
        parameters = dict(divided.named_parameters())
        assert parameters.keys() == whole.keys()
        for key, parameter in parameters.items():
            assert parameter.shape == whole[key].shape
            assert parameter.dtype == whole[key].dtype
            assert parameter.isnan().all()
            start, values = local_slice(parameter)
            assert start == sum(len(piece) for piece in pieces[key])
            pieces[key].append(values)
    assert all(torch.equal(torch.cat(found), whole[key].data.flatten()) for key, found in pieces.items())


def test_a_rank_never_holds_more_than_its_share_and_a_tensor(parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with counted(monkeypatch) as before:
        size = num_bytes(load(parts, "language"))
    with placing(split(1, 4)), counted(monkeypatch) as live:
        model = load(parts, "language")
    largest = max(each.numel() * each.element_size() for each in model.parameters())
    assert before.peak >= size
    assert live.peak <= size / 4 + 3 * largest + 50_000
    assert live.peak < size / 2


def test_what_transformers_reads_goes_to_the_device_alone(parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`meta` stands for a GPU: nothing of the model is left on the host."""
    with placing(Placement(torch.device("meta"))), counted(monkeypatch) as live:
        model = load(parts, "language")
    largest = max(each.numel() * each.element_size() for each in model.parameters())
    assert {each.device.type for each in model.parameters()} == {"meta"}
    assert live.peak <= 2 * largest + 50_000


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize(("load_as", "share"), [("nf4", 0.5), ("int8", 0.75)])
def test_a_quantized_base_is_never_whole_in_16_bits(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, published: bool, load_as: Any, share: float
) -> None:
    """Embedding and head stay in 16 bits: 5 % of this model."""
    pytest.importorskip("bitsandbytes")
    folder, kind = parts / "language", PretrainedLanguage
    if published:
        shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 8}
        folder, kind = make_published(tmp_path / "published", **shape), PublishedLanguage
    size = num_bytes(kind(path=str(folder)).load_model(torch.bfloat16))
    with counted(monkeypatch) as live:
        model = kind(path=str(folder), load=load_as).load_model(torch.bfloat16)
    assert model is not None
    assert live.peak < share * size


def test_a_divided_parameter_is_cast_gathered_and_given_up() -> None:
    values = torch.arange(10.0).view(2, 5)
    parameter, whole = nn.Parameter(values.clone()), nn.Parameter(values.clone())

    def everybody(padded: Tensor) -> Tensor:
        both = torch.arange(12.0, dtype=padded.dtype).view(3, 4)
        assert torch.equal(padded[:2], both[2][:2])
        return both.flatten()

    divide(parameter, Placement(CPU, Division(2, 3, CPU, everybody)))
    assert local_slice(parameter)[0] == 8
    assert local_slice(parameter)[1].tolist() == [8.0, 9.0]
    cast(parameter, torch.bfloat16)
    cast(whole, torch.bfloat16)
    with gathered([parameter, whole]):
        assert torch.equal(parameter, whole)
    assert parameter.isnan().all()
    assert share_of(whole) is None


def test_a_forward_gathers_a_module_at_a_time(parts: Path) -> None:
    expected = load(parts, "language")
    ids = torch.arange(7).unsqueeze(0)
    with placing(split(0, 1)):
        model: Any = load(parts, "language")
        with gathering(model), torch.no_grad(), LiveBytes() as live:
            found = model(input_ids=ids).logits
    assert torch.equal(found, expected(input_ids=ids).logits)  # type: ignore[operator]
    assert live.peak < num_bytes(model) / 2
    assert all(each.isnan().all() for each in model.parameters())
