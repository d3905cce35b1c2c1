"""AnyRes end to end: trained, resumed, merged to LlavaNextForConditionalGeneration, opened, answered, scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from models.common.errors import InputError
from tests.support.backbones import IMAGE_SIZE, tiny_recipe
from tests.support.families import SIZES, answer_and_score, merge_and_open, train_and_resume
from tests.support.shards import caption_sample, image_bytes, write_tar
from tests.support.training import weights
from trainer.config.recipe import Recipe

S = IMAGE_SIZE


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Images of several proportions, and a text without one."""
    from data_pipeline.index_build import build_index

    folder = tmp_path_factory.mktemp("anyres")
    (folder / "shards").mkdir()
    samples = [(f"{n:03d}", caption_sample(n) | {"png": image_bytes(n, SIZES[n % len(SIZES)])}) for n in range(11)]
    write_tar(folder / "shards" / "a.tar", [*samples, ("999", caption_sample(999, image=False))])
    build_index(folder / "shards")
    made = tiny_recipe(folder, folder / "shards")
    pinpoints = [[S, 2 * S], [2 * S, S], [2 * S, 2 * S], [S, 3 * S]]
    made["model"]["image"] = {"kind": "anyres", "pinpoints": pinpoints}
    return made


@pytest.mark.slow
def test_the_family_works_end_to_end(recipe: dict[str, Any], tmp_path: Path) -> None:
    train_and_resume(recipe)
    newline = [weights(recipe, stage)["projector.newline.weight"] for stage in ("align", "lora")]
    assert not torch.equal(*newline), "it learns in both stages"
    predictor = merge_and_open(recipe, tmp_path / "bundle")
    assert type(predictor.model).__name__ == "LlavaNextForConditionalGeneration"
    torch.testing.assert_close(predictor.model.model.image_newline, newline[1])
    answers = answer_and_score(predictor, tmp_path)
    assert len(set(answers)) > 2


def test_what_anyres_cannot_join_is_refused(recipe: dict[str, Any]) -> None:
    from models.build import read_metadata

    values = json.loads(json.dumps(recipe))
    values["model"]["vision"]["keep_cls"] = True
    with pytest.raises(InputError, match=r"model\.vision\.keep_cls"):
        read_metadata(Recipe.model_validate_json(json.dumps(values)).model, 256)
