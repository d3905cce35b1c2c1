"""Numbers that are not finite or leap: a bad row costs the row, a bad gradient the step, a spike goes back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from models.build import read_metadata
from models.common.errors import InputError
from tests.support.backbones import tiny_recipe
from tests.support.native import NATIVE
from tests.support.poison import leap, leave_out, leave_out_batches, poison
from tests.support.published import published_recipe
from tests.support.ranks import run_on_ranks
from tests.support.shards import write_set
from tests.support.training import events, losses, same_weights, train_all, vary
from trainer.config.recipe import Recipe
from trainer.distributed.context import DistributedContext
from trainer.inputs import open_rows
from trainer.ledger.restarts import counting, read_restarts

ZEROS = ("zero0", "zero1", "zero2", "zero3")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["parts", *NATIVE[1:]])
def recipe(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict[str, Any]:
    """Four global batches over 16 of 17 samples, so that none comes twice; dropout, so that random streams count."""
    folder = tmp_path_factory.mktemp("not_finite")
    write_set(folder / "shards", [5, 1, 11])
    recipe = tiny_recipe(folder, folder / "shards")
    if request.param != "parts":
        recipe = published_recipe(folder, folder / "shards", request.param)
    recipe["stages"]["lora"]["init"] = None
    recipe["stages"]["lora"]["tune"]["language"]["dropout"] = 0.1
    recipe["stages"]["lora"]["duration"]["count"] = 3
    return recipe


@pytest.fixture(scope="module")
def keys(recipe: dict[str, Any]) -> tuple[str, str]:
    """A sample of the second global batch that the second of two ranks computes, and one of the third, of the first."""
    checked = Recipe.model_validate_json(json.dumps(recipe))
    stream = open_rows(checked, "lora", read_metadata(checked.model, 256), DistributedContext(), None)
    batches = [stream.next_rows() for _ in range(3)]
    return batches[1][2][0].key, batches[2][0][0].key


@pytest.fixture(scope="module")
def runs(recipe: dict[str, Any], keys: tuple[str, str]) -> dict[str, dict[str, Any]]:
    jobs: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {}

    def add(name: str, change: Any, **settings: Any) -> None:
        jobs[name] = (vary(recipe, name, "lora", **settings), "lora", {"change": change})

    for zero in ZEROS:
        add(f"bad_{zero}", (poison, ((keys[0], "picture"), (keys[1], "gradient"))), engine__zero=zero)
        add(f"without_{zero}", (leave_out, (keys[0], 3)), engine__zero=zero)
    add("loss", (poison, ((keys[0], "loss"),)), batch__micro_rows=1)
    run_on_ranks(2, train_all, list(jobs.values()))
    return {name: job[0] for name, job in jobs.items()}


@pytest.mark.parametrize("zero", ZEROS)
def test_a_bad_row_costs_the_row_and_a_bad_gradient_the_step(
    runs: dict[str, dict[str, Any]], keys: tuple[str, str], zero: str
) -> None:
    """Weights, and with them moments and learning rates, are those of a run that never saw row and batch."""
    found = runs[f"bad_{zero}"]
    same_weights(found, runs[f"without_{zero}"], "lora", rtol=0, atol=0)
    row, gradient, skipped = events(found, "lora")
    assert (row["event"], row["batch"], row["rank"], row["key"]) == ("not finite", 2, 1, keys[0])
    assert (row["phase"], row["module"]) == ("forward", "vlm.projector")
    assert (gradient["batch"], gradient["rank"], gradient["key"]) == (3, 0, keys[1])
    assert gradient["phase"] == "backward"
    assert gradient["module"].startswith("vlm.projector")
    assert (skipped["event"], skipped["batch"]) == ("skipped", 3)
    lines = (Path(found["run"]) / "lora/quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == list(keys)


def test_a_loss_that_is_not_finite_is_a_bad_row_too(runs: dict[str, dict[str, Any]], keys: tuple[str, str]) -> None:
    (event,) = events(runs["loss"], "lora")
    assert (event["key"], event["phase"], event["module"]) == (keys[0], "forward", "vlm.language.lm_head")
    (only,) = counting(read_restarts(Path(runs["loss"]["run"]) / "lora" / "ledger"))
    lines = only.lines(2)
    assert [len(line["left_out"]) for line in lines] == [0, 1]


@pytest.fixture(scope="module")
def spikes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """A leap at batch 9; the last checkpoint lies behind batch 6."""
    folder = tmp_path_factory.mktemp("spikes")
    write_set(folder / "shards", [5, 1, 9])
    recipe = tiny_recipe(folder, folder / "shards")
    common: dict[str, Any] = {
        "guard__spike": {"window": 8},
        "checkpoint__every_steps": 6,
        "duration__count": 12,
    }
    whole, killed = vary(recipe, "spike", "align", **common), vary(recipe, "killed", "align", **common)
    expected = vary(recipe, "expected", "align", **common)
    often = vary(recipe, "often", "align", **common | {"guard__spike": {"window": 8, "max_rollbacks": 0}})
    run_on_ranks(
        1,
        train_all,
        [
            (whole, "align", {"change": (leap, (9,))}),
            (killed, "align", {"change": (leap, (9,)), "stop_after": 8}),
            (killed, "align", {"change": (leap, (9,)), "stop_after_batches": 11}),
            (killed, "align", {"change": (leap, (9,))}),
            (expected, "align", {"change": (leave_out_batches, (7, 9))}),
        ],
    )
    return {"whole": whole, "killed": killed, "expected": expected, "often": often}


def test_a_spike_goes_back_past_its_data(spikes: dict[str, dict[str, Any]]) -> None:
    same_weights(spikes["whole"], spikes["expected"], "align", rtol=0, atol=0)
    assert losses(spikes["whole"], "align") == losses(spikes["expected"], "align")
    (event,) = events(spikes["whole"], "align")
    assert (event["checkpoint"], event["first_batch"], event["last_batch"]) == ("step_000006", 7, 9)


def test_a_kill_before_and_after_going_back_changes_nothing(spikes: dict[str, dict[str, Any]]) -> None:
    same_weights(spikes["killed"], spikes["expected"], "align", rtol=0, atol=0)


def test_a_run_goes_back_a_bounded_number_of_times(spikes: dict[str, dict[str, Any]]) -> None:
    with pytest.raises(InputError, match="gone back 0 times already"):
        run_on_ranks(1, train_all, [(spikes["often"], "align", {"change": (leap, (9,))})])
