"""A whole family in seconds: every stage trained for a few steps, one of them in two runs, merged, opened, scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from eval.predictor import Decoding, Predictor, Query, Turn
from eval.tasks import make_task
from eval.tasks.config import VqaConfig
from models.bundle import verify
from models.common.errors import run_cli
from tests.support.arrivals import CACHES, answer_in_company
from tests.support.benchmarks import make_benchmark
from tests.support.bundles import image
from tests.support.ranks import run_on_ranks
from tests.support.training import losses, same_weights, train_all, vary
from tools.export.merge import main as merge

SIZES = ((64, 64), (90, 40), (40, 110))


def train_and_resume(recipe: dict[str, Any]) -> None:
    """Every stage to its end; the last one also from a kill in its middle, which must give the same weights."""
    *earlier, last = recipe["stages"]
    whole, broken = recipe, vary(recipe, "broken", last, init=None)
    jobs: list[tuple[dict[str, Any], str, dict[str, Any]]] = [(recipe, stage, {}) for stage in (*earlier, last)]
    if recipe["stages"][last].get("init") is not None:
        whole = vary(recipe, "whole", last, init=None)
        jobs.append((whole, last, {}))
    jobs += [(broken, last, {"stop_after": 3}), (broken, last, {})]
    run_on_ranks(1, train_all, jobs)
    assert all(loss > 0 for stage in (*earlier, last) for loss in losses(recipe, stage))
    same_weights(broken, whole, last, rtol=0, atol=0)


def merge_and_open(recipe: dict[str, Any], out: Path) -> Predictor:
    """The bundle of the last stage, whose parity holds in fp32, open on the CPU."""
    *_, last = recipe["stages"]
    assert run_cli(merge, [recipe["run"], str(out), "--stage", last]) == 0
    checks = {check.name: check for check in verify(out).parity.checks}
    assert checks["largest relative logit difference"].value < 1e-5
    assert checks["largest pixel difference"].value == 0.0
    return Predictor.open(out, device="cpu")


def answer_and_score(predictor: Predictor, folder: Path) -> list[str]:
    """Answers about images of several proportions, equal alone and in a batch; then a benchmark, run to a score."""
    queries = [Query((image("circle", size),), (Turn("user", f"What is {size}?"),)) for size in SIZES]
    queries += [Query((), (Turn("user", "No picture?"),))]
    queries += [Query((image("circle", SIZES[1]), image("square", SIZES[0])), (Turn("user", "Two?"),))]
    decoding = Decoding(max_new_tokens=8)
    answers = predictor.answer(queries, decoding)
    assert [predictor.answer([query], decoding)[0] for query in queries] == answers
    assert ["".join(predictor.stream(query, decoding)) for query in queries] == answers
    for kind in CACHES:
        assert answer_in_company(predictor, [(query, decoding) for query in queries], kind, seed=0) == answers
    tiny = make_benchmark(folder)
    config = {"kind": "vqa", "questions": str(tiny.questions), "annotations": str(tiny.annotations)}
    task = make_task(VqaConfig.model_validate_json(json.dumps({**config, "images": str(tiny.images)})))
    result = task.score(task.ask(predictor, 4, range(task.num_samples), progress=False))
    assert all(value is not None for value in result.metrics.values())
    return answers
