"""How often a step waits for the device: never in a layer, at most once a micro-batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.backbones import tiny_recipe
from tests.support.ranks import run_on_ranks
from tests.support.shards import write_set
from tests.support.training import vary
from tests.support.waits import counting_waits, waits_of_a_step


def test_every_look_at_a_value_is_counted() -> None:
    values = torch.arange(4.0)
    with counting_waits() as waits:
        float(values[0] + 1), values.tolist(), values[values > 1], bool(values.sum() > 0)
    assert waits.num == 4


@pytest.mark.slow
def test_a_micro_batch_more_is_at_most_one_wait_more(tmp_path: Path) -> None:
    """The same rows as 4, 2 and 1 micro-batches, under ZeRO-2 as the recipes have it, adapters on."""
    write_set(tmp_path / "shards", [5, 1, 9])
    recipe = tiny_recipe(tmp_path, tmp_path / "shards")
    recipe["stages"]["lora"]["init"] = None
    changes = {"engine__zero": "zero2", "engine__activation_checkpointing": 1}
    runs = [vary(recipe, f"micro_{rows}", "lora", batch__micro_rows=rows, **changes) for rows in (1, 2, 4)]
    ((four, many), (two, some), (one, few)) = run_on_ranks(1, waits_of_a_step, runs, "lora")[0]
    assert (four, two, one) == (4, 2, 1)
    print(f"waits: {many}, {some}, {few}")
    assert many - few <= four - one
    assert some - few <= two - one
