"""The joined model: packed rows equal separate ones, and images and their tokens must agree in number."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models.build import build_vlm, read_metadata
from models.common.documents import read_json
from models.common.errors import InputError
from models.common.source import directory_of
from models.vlm import VLM
from tests.support.backbones import NUM_IMAGE_TOKENS, tiny_recipe
from trainer.config.recipe import Recipe


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def vlm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> VLM:
    from tests.support.backbones import make_clip, make_language

    folder = tmp_path_factory.mktemp(request.param)
    make_clip(folder / "vision")
    make_language(folder / "language", request.param)
    recipe = Recipe.model_validate(tiny_recipe(folder, Path("none")))
    return build_vlm(recipe.model, read_metadata(recipe.model, 128), frozen_dtype=torch.float32, seed=0).eval()


def row(vlm: VLM, words: list[int], image: bool) -> torch.Tensor:
    return torch.tensor([vlm.image_token_id] * (NUM_IMAGE_TOKENS if image else 0) + words)


def tiles(seed: int, num: int = 1) -> torch.Tensor:
    return torch.randint(0, 256, (num, 48, 48, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@torch.no_grad()
def test_packed_rows_equal_separate_ones(vlm: VLM) -> None:
    """fp32; another shape of the same sums, hence the tolerance."""
    samples = [
        (row(vlm, [5, 6, 7], True), tiles(0)),
        (row(vlm, [9, 8], False), tiles(1, 0)),
        (row(vlm, [4] * 6, True), tiles(2)),
    ]
    apart = [vlm(ids[None], torch.arange(len(ids))[None], pixels)[0] for ids, pixels in samples]
    packed_ids = torch.cat([ids for ids, _ in samples])[None]
    positions = torch.cat([torch.arange(len(ids)) for ids, _ in samples])[None]
    packed = vlm(packed_ids, positions, torch.cat([pixels for _, pixels in samples]))[0]
    torch.testing.assert_close(packed, torch.cat(apart), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_padding_on_the_right_changes_nothing(vlm: VLM) -> None:
    ids = row(vlm, [5, 6, 7], True)
    alone = vlm(ids[None], torch.arange(len(ids))[None], tiles(0))[0]
    padded_ids = torch.cat([ids, torch.zeros(9, dtype=torch.long)])[None]
    padded_positions = torch.cat([torch.arange(len(ids)), torch.zeros(9, dtype=torch.long)])[None]
    padded = vlm(padded_ids, padded_positions, tiles(0))[0]
    torch.testing.assert_close(padded[: len(ids)], alone, rtol=1e-4, atol=1e-5)


def test_a_row_without_a_image_still_reaches_the_projector(vlm: VLM) -> None:
    """Every rank must take part in the projector's collectives; the text's own result must not change."""
    vlm.projector.requires_grad_(True)
    ids = row(vlm, [5, 6, 7], False)
    hidden = vlm(ids[None], torch.arange(3)[None], tiles(0, 0))
    plain = vlm.language.get_decoder()(input_ids=ids[None]).last_hidden_state
    torch.testing.assert_close(hidden, plain, rtol=1e-5, atol=1e-6)
    hidden.sum().backward()
    assert all(not parameter.grad.any() for parameter in vlm.projector.parameters() if parameter.grad is not None)
    assert all(parameter.grad is not None for parameter in vlm.projector.parameters())


def test_image_tokens_and_features_must_agree(vlm: VLM) -> None:
    ids = row(vlm, [5], True)[None]
    with pytest.raises(ValueError, match="16 image tokens in the rows, but 32 features"):
        vlm(ids, torch.arange(17)[None], tiles(0, 2))


def test_a_directory_that_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no config\.json"):
        directory_of(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json: not valid JSON"):
        read_json(tmp_path, "config.json")
