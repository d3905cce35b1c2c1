"""The probe before the first step: what it says, on several ranks and under ZeRO-3, and that it changes nothing."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from models.common.files import read_lines
from tests.support.ranks import run_on_ranks
from tests.support.shards import write_set
from tests.support.sinks import sink_recipe
from tests.support.training import ledger_lines, losses, same_weights, train, vary
from trainer.callbacks import numerics
from trainer.distributed.context import DistributedContext

Job = tuple[dict[str, Any], str, dict[str, Any]]
NAMES = ("numerics/cosine/projector", "numerics/norm_ratio/projector", "numerics/seconds")


def probed_and_not(ranks: DistributedContext, jobs: list[Job], without: list[Job]) -> list[str]:
    """Train some stages, then others whose probe is off; returns what this rank logged."""
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("trainer").addHandler(handler)
    logging.getLogger("trainer").setLevel(logging.INFO)
    for recipe, stage, options in jobs:
        train(ranks, recipe, stage, **options)
    numerics.NumericsProbe.before_batch = lambda *_: None  # type: ignore[method-assign]
    for recipe, stage, options in without:
        train(ranks, recipe, stage, **options)
    return told


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("probe")
    write_set(folder / "shards", [5, 1, 6])
    recipe = sink_recipe(folder, folder / "shards", "")
    lora = {"init": None, "tune__language__dropout": 0.3, "duration__count": 3, "engine__zero": "zero3"}
    known = vary(recipe, "known", "align", data__template__opening=True)
    silent = vary(recipe, "silent", "align")
    pairs = {"lora": vary(recipe, "lora", "lora", **lora), "lora_silent": vary(recipe, "lora_silent", "lora", **lora)}
    cut: Job = (recipe, "align", {"stop_after": 4})
    (told,) = run_on_ranks(
        1, probed_and_not, [cut, (recipe, "align", {}), (known, "align", {"stop_after": 1})], [(silent, "align", {})]
    )
    run_on_ranks(2, probed_and_not, [(pairs["lora"], "lora", {})], [(pairs["lora_silent"], "lora", {})])
    return {"front": recipe, "known": known, "silent": silent, "told": told, **pairs}


def lines(recipe: dict[str, Any], stage: str) -> list[dict[str, Any]]:
    return list(read_lines(Path(recipe["run"]) / stage / "metrics.jsonl"))


@pytest.mark.slow
@pytest.mark.parametrize(("probed", "silent", "stage"), [("front", "silent", "align"), ("lora", "lora_silent", "lora")])
def test_it_changes_nothing(runs: dict[str, Any], probed: str, silent: str, stage: str) -> None:
    """One rank; and two under ZeRO-3 with dropout: losses, weights, draws are those of a run without, bit for bit."""
    assert losses(runs[probed], stage) == losses(runs[silent], stage)
    same_weights(runs[probed], runs[silent], stage, rtol=0, atol=0)
    ledgers = [sorted((Path(runs[name]["run"]) / stage / "ledger").glob("*/rank_*")) for name in (probed, silent)]
    draws = [[line["draws"] for file in files for line in ledger_lines(file)][:4] for files in ledgers]
    assert draws[0] == draws[1]
    assert not set(NAMES) & set(lines(runs[silent], stage)[0])


@pytest.mark.slow
def test_the_first_line_has_it_and_a_start_that_resumes_does_not_measure_again(runs: dict[str, Any]) -> None:
    first, *others = lines(runs["front"], "align")
    assert set(NAMES) <= set(first)
    assert len(others) == 5
    assert not any(set(NAMES) & set(line) for line in others)
    assert first["numerics/cosine/projector"] < 0.85
    assert lines(runs["known"], "align")[0]["numerics/cosine/projector"] > 0.98


@pytest.mark.slow
def test_two_ranks_under_zero3_measure_every_part_that_learns(runs: dict[str, Any]) -> None:
    first = lines(runs["lora"], "lora")[0]
    assert {name for name in first if name.startswith("numerics/cosine/")} == {
        "numerics/cosine/projector",
        "numerics/cosine/language",
    }


@pytest.mark.slow
def test_the_log_states_cosines_cost_and_what_to_try(runs: dict[str, Any]) -> None:
    told = [line for line in runs["told"] if "numerics" in line]
    assert (
        len([line for line in told if "numerics probe: gradient of 4 rows in bf16 beside fp32: projector" in line]) == 2
    )
    assert all(line.endswith(" s)") for line in told if "numerics probe" in line)
    (warned,) = [line for line in told if "numerics probe" not in line]  # behind a known token there is none
    assert "the image stands at the very front" in warned
    assert "data.template.opening" in warned


def fake_run(*, needed: int, is_quantized: bool = False) -> Any:
    module = torch.nn.Linear(2, 2)
    if is_quantized:
        module.register_parameter("packed", torch.nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False))
    engine = SimpleNamespace(module=module, probe_bytes=lambda: needed)
    context = SimpleNamespace(ranks=DistributedContext(), device=torch.device("cpu"))
    return SimpleNamespace(services=SimpleNamespace(engine=engine), context=context)


def test_it_is_skipped_with_a_word_where_fp32_does_not_fit() -> None:
    assert numerics._reason_to_skip(fake_run(needed=1000)) == ""
    assert "fp32 takes 1000000.0 GB here, and" in numerics._reason_to_skip(fake_run(needed=10**15))
    assert "quantized" in numerics._reason_to_skip(fake_run(needed=1, is_quantized=True))
