"""Parts that do not fit together are refused before a weight is read; what is new is drawn from the seed alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from models.build import build_vlm, new_prefixes, read_metadata
from models.common.errors import InputError
from models.config import ModelConfig
from tests.support.backbones import tiny_recipe

ANYRES = {"kind": "anyres", "pinpoints": ((48, 96), (96, 48))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parts")


def model(folder: Path, **changes: Any) -> ModelConfig:
    values = tiny_recipe(folder, folder / "shards")["model"]
    vision = values["vision"] | changes.pop("vision", {})
    return ModelConfig.model_validate(values | {"vision": vision, **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image": ANYRES, "vision": {"keep_cls": True}}, "model.vision.keep_cls: true, but anyres"),
        ({"image": ANYRES, "projector": {"kind": "perceiver"}}, "anyres needs a feature for each patch, perceiver"),
        ({"projector": {"kind": "pixel_shuffle", "factor": 3}}, "16 features are no grid of 3 x 3 squares"),
    ],
)
def test_what_does_not_fit_is_refused(folder: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        read_metadata(model(folder, **changes), 64)


def test_a_projector_that_reads_no_text_is_no_reader(folder: Path) -> None:
    with pytest.raises(InputError, match=r"model\.projector\.kind: mlp reads no text"):
        read_metadata(model(folder), 64, "projector")


def test_new_parts_follow_from_the_seed_and_touch_no_generator(folder: Path) -> None:
    config = model(folder, image=ANYRES, future={"kind": "parallel", "num_tokens": 3})
    facts = read_metadata(config, 64)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    states = [build_vlm(config, facts, frozen_dtype=torch.float32, seed=seed).state_dict() for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), before)
    new = [name for name in states[0] if name.startswith(new_prefixes(config))]
    assert {"projector.newline.weight", "projector.linear_1.weight"} < set(new)
    assert any(name.startswith("future.") for name in new)
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
    drawn = [name for name in new if "norm" not in name]
    assert not any(torch.equal(states[0][name], states[2][name]) for name in drawn)
