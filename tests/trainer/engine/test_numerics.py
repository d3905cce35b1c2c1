"""A gradient beside fp32's: low where an image stands before what the model knows, high behind it, nothing changed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.batch import Batch
from data_pipeline.sample import Encoded, SampleRef
from models.build import read_metadata
from tests.support.shards import write_set
from tests.support.sinks import sink_recipe
from trainer.config.recipe import Recipe
from trainer.engine.numerics import (
    MAX_ROWS,
    MAX_TOKENS,
    Agreement,
    compare_gradients,
    few_rows,
    image_is_first,
    is_quantized,
    needed_bytes,
    one_by_one,
)
from trainer.engine.train_step import DTYPES, TrainingTask
from trainer.engine.tuning import ParameterGroup
from trainer.starting_model import starting_model
from trainer.validation.held_out import HeldOut


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("numerics")
    write_set(folder / "shards", [8])
    return folder


def opened(
    folder: Path, opening: str | bool | None, precision: str = "bf16"
) -> tuple[TrainingTask, list[ParameterGroup], list[Batch]]:
    """The model at the start of alignment, what learns, and eight samples."""
    recipe = Recipe.model_validate_json(json.dumps(sink_recipe(folder, folder / "shards", opening, precision)))
    facts = read_metadata(recipe.model, 256)
    vlm, groups, _ = starting_model(recipe, "align", facts, None)
    held_out = HeldOut.open(recipe.stage("align").data, facts, 8)
    rows = [(sample,) for sample in held_out.encoded(range(8)) if isinstance(sample, Encoded)]
    module = TrainingTask(vlm, recipe.stage("align").objective.build(), precision).eval()
    return module, groups, list(one_by_one(rows, facts.text, torch.device("cpu"), are_compared=False))


# By hand: -0.26 and 0.9999 on a CPU without bf16 units; products are rounded to bf16 everywhere.
@pytest.mark.parametrize(
    ("opening", "is_low"), [("", True), (True, False), (None, False), ("\n", False), ("What", True)]
)
def test_a_token_that_the_model_knows_makes_the_gradient_one_that_bf16_carries(
    folder: Path, opening: str | bool | None, is_low: bool
) -> None:
    found = compare_gradients(*opened(folder, opening))
    assert list(found) == ["projector"]
    assert found["projector"].cosine < 0.85 if is_low else found["projector"].cosine > 0.98
    if not is_low:
        assert found["projector"].norm_ratio == pytest.approx(1, abs=0.1)


def test_fp32_is_what_the_same_weights_give_in_an_fp32_stage(folder: Path) -> None:
    module, groups, batches = opened(folder, None)
    same, same_groups, _ = opened(folder, None, "fp32")
    for ours, theirs in zip(same.parameters(), module.parameters(), strict=True):
        ours.data.copy_(theirs.data)  # rounded to bf16 where they are frozen
    norm = math.sqrt(compare_gradients(module, groups, batches)["projector"].square_sum_fp32)
    agreement = compare_gradients(same, same_groups, batches)["projector"]
    assert (agreement.cosine, agreement.norm_ratio) == (pytest.approx(1, abs=1e-9), 1.0)
    assert norm == pytest.approx(math.sqrt(agreement.square_sum_fp32), rel=1e-4)  # the order of sums


def test_nothing_of_the_module_is_changed(folder: Path) -> None:
    module, groups, batches = opened(folder, "")
    tensors = [*module.parameters(), *module.buffers()]
    before = [(each.data_ptr(), each.dtype, each.clone()) for each in tensors]
    state = torch.get_rng_state()
    compare_gradients(module, groups, batches)
    for each, (address, dtype, value) in zip(tensors, before, strict=True):
        assert (each.data_ptr(), each.dtype) == (address, dtype)
        assert torch.equal(each, value)
        assert each.grad is None
    assert module.precision == "bf16"
    assert torch.equal(torch.get_rng_state(), state)


def test_fp16_finds_a_scale_at_which_its_gradient_is_finite(folder: Path) -> None:
    module, groups, batches = opened(folder, None, "fp16")
    asked: list[bool] = []
    found = compare_gradients(module, groups, batches, lambda is_needed: bool(asked.append(is_needed)) or is_needed)
    assert asked[-1] is False
    assert found["projector"].cosine > 0.98


def test_rows_count_alike_whatever_their_norm() -> None:
    same, opposite = Agreement.of_row(6.0, 9.0, 4.0), Agreement.of_row(-1e4, 1e4, 1e4)
    assert (same.cosine, same.norm_ratio) == (1.0, 1.5)
    assert (same + opposite).cosine == 0.0
    assert (same + opposite).norm_ratio == pytest.approx(1, abs=1e-3)
    for lost in (math.nan, math.inf, 0.0):
        row = Agreement.of_row(lost, lost, 4.0)
        assert (row.cosine, row.norm_ratio, row.num_rows) == (0.0, 0.0, 1.0)
    assert Agreement.of_row(0.0, 0.0, 0.0).num_rows == 0.0  # nothing reaches the part


def sample(num_tokens: int, *, has_image: bool = True) -> Encoded:
    tiles = np.zeros((int(has_image), 2, 2, 3), dtype=np.uint8)
    ids = np.zeros(num_tokens, dtype=np.int32)
    return Encoded(SampleRef(0, 0, 0, 0, "shard", "key"), ids, ids, tiles, ((2, 2),) * int(has_image), 0)


def test_few_rows_are_the_first_with_images_that_fit() -> None:
    rows: list[Any] = [(sample(3, has_image=False),), *((sample(number),) for number in range(1, 12))]
    assert [len(row[0].input_ids) for row in few_rows(rows)] == list(range(1, MAX_ROWS + 1))
    long: list[Any] = [(sample(MAX_TOKENS + 1),), (sample(1),)]
    assert few_rows(long) == long[:1]
    assert few_rows([()]) == [()]  # a rank whose slots have no sample
    assert image_is_first([(sample(1),)], 0)
    assert not image_is_first([(sample(1),), ()], 1)


def test_memory_and_what_cannot_be_measured(folder: Path) -> None:
    module, groups, _ = opened(folder, None)
    frozen = sum(each.numel() for each in module.parameters() if each.dtype == DTYPES["bf16"])
    learning = sum(each.numel() for group in groups for each in group.parameters)
    assert needed_bytes(module, groups, torch.Tensor.numel) == pytest.approx(1.25 * (4 * frozen + 8 * learning), abs=64)
    assert not is_quantized(module)
    module.vlm.language.register_parameter("packed", torch.nn.Parameter(torch.zeros(2, dtype=torch.uint8), False))
    assert is_quantized(module)
