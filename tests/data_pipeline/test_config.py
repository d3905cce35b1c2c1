"""Data configurations are plain YAML, tagged by kind, and strict."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from data_pipeline.config import DataConfig, ImageAugment, PadPacking

LEAST: dict[str, Any] = {"sources": [{"path": "a"}], "template": {"kind": "plain"}, "max_length": 2048}


def test_a_recipe_spells_it_in_plain_yaml() -> None:
    loaded = DataConfig.model_validate(
        {
            "sources": [{"path": "a", "weight": 2}, {"path": "b", "weight": 0.5}],
            "template": {"kind": "chatml"},
            "packing": {"kind": "pack", "row_tokens": 4096},
            "max_length": 2048,
        }
    )
    assert DataConfig.model_validate_json(loaded.model_dump_json()) == loaded


def test_what_a_recipe_leaves_out_changes_nothing() -> None:
    found = DataConfig.model_validate(LEAST)
    assert (found.packing, found.augment, found.jpeg, found.too_long) == (PadPacking(), None, "exact", "skip")
    assert ImageAugment() == ImageAugment(crop_area=(1.0, 1.0), colour=0.0, flip=0.0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"sources": []}, "at least 1 item"),
        ({"sources": [{"path": "a", "weight": 0}]}, "greater than 0"),
        ({"template": {"kind": "vicuna"}}, "vicuna_v1"),
        ({"packing": {"kind": "pack"}}, "row_tokens"),
        ({"packing": {"kind": "pad", "lookahead": 3}}, "Extra inputs"),
        ({"max_length": 1}, "greater than 1"),
        ({"max_length": "256"}, "valid integer"),
        ({"augment": {"kind": "picture", "crop_area": [0.9, 0.5]}}, "smallest and the largest share"),
        ({"augment": {"kind": "picture", "crop_area": [0.0, 0.5]}}, "above 0"),
        ({"shuffle": 3}, "Extra inputs"),
    ],
)
def test_what_is_wrong_is_refused(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        DataConfig.model_validate(LEAST | change)
