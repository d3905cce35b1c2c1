"""What the loop does around its steps: looking changes nothing, patience ends a stage, the best is kept, fp16, DoRA."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

import trainer.checkpoint.format as checkpoint
from models.common.errors import InputError
from models.common.files import read_lines
from tests.support.backbones import tiny_recipe
from tests.support.ranks import run_on_ranks
from tests.support.shards import write_mixed_set, write_set
from tests.support.training import ledger_lines, losses, same_weights, train_all, vary, weights
from trainer.config.recipe import Recipe
from trainer.distributed.context import DistributedContext
from trainer.ledger.audit import audit
from trainer.ledger.blocks import block_of_lines
from trainer.replay import replay

pytestmark = pytest.mark.slow
Job = tuple[dict[str, Any], str, dict[str, Any]]


def overflow(stage: Any, step: int) -> None:
    """A scale that is far too large, from that step on: its gradient leaves fp16's range."""
    compute = stage.services.engine.backward

    def backward(loss_sum: Any, num_targets: float, scale: float) -> None:
        if stage.state.consumed.steps == step and stage.state.loss_scale.value == 2.0**15:
            loss_sum = loss_sum * 1e12
        compute(loss_sum, num_targets, scale)

    stage.services.engine.backward = backward


def ask_to_stop(stage: Any, step: int, signal_number: int, rank: int) -> None:
    """One rank gets a signal while that step is computed."""
    stage.services.preemption.install()
    compute = stage.services.engine.backward

    def backward(*arguments: Any) -> None:
        if stage.state.consumed.steps == step and stage.context.ranks.rank == rank:
            os.kill(os.getpid(), signal_number)
        compute(*arguments)

    stage.services.engine.backward = backward


def train_and_replay(
    ranks: DistributedContext, jobs: list[Job], replays: list[tuple[dict[str, Any], int]], deaf: Job
) -> dict[str, Any]:
    """Whether rows are the same, and how far the loss is off, of steps that are computed again after the training."""
    train_all(ranks, jobs)
    again = [replay(Recipe.model_validate_json(json.dumps(recipe)), "align", step) for recipe, step in replays]
    with pytest.raises(InputError) as refused:
        train_all(ranks, [deaf])
    return {"replays": [(found.same_rows, found.difference) for found in again], "deaf": str(refused.value)}


def deafen(stage: Any, name: str) -> None:
    """No gradient reaches one tensor."""
    dict(stage.services.engine.module.vlm.named_parameters())[name].register_hook(lambda gradient: gradient * 0)


def fill_disk(stage: Any, step: int) -> None:
    """The disk is full when the checkpoint after that step is to be written, and has space again later."""
    save_file = checkpoint.save_file

    def full(*_: Any, **__: Any) -> None:
        checkpoint.save_file = save_file
        raise OSError(28, "No space left on device")

    begin = stage.services.checkpoints.begin

    def begin_save(at: int, **state: Any) -> None:
        if at == step:
            checkpoint.save_file = full
        begin(at, **state)

    stage.services.checkpoints.begin = begin_save


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("loop")
    write_set(folder / "shards", [5, 1, 11])
    write_mixed_set(folder / "mixed")
    return tiny_recipe(folder, folder / "shards")


def validated(recipe: dict[str, Any], run: str, **changes: Any) -> dict[str, Any]:
    data = recipe["stages"]["align"]["data"]
    validation = {"data": data, "every_steps": 1, "num_samples": 5, "generate": 1, "max_new_tokens": 2}
    return vary(recipe, run, "align", validation=validation, **changes)


def looked_into(recipe: dict[str, Any], run: str, **changes: Any) -> dict[str, Any]:
    varied = validated(recipe, run, **changes)
    varied["tracking"] |= {"histograms_every_steps": 3, "token_table_every_steps": 4, "tensorboard": True}
    return varied


@pytest.fixture(scope="module")
def runs(recipe: dict[str, Any]) -> dict[str, Any]:
    mixed = vary(recipe, "mixed", "align")
    mixed["stages"]["align"]["data"] = {**mixed["stages"]["align"]["data"]}
    mixed["stages"]["align"]["data"]["sources"] = [{"path": str(Path(recipe["run"]).parent / "mixed")}]
    still = {"tune__projector__learning_rate": 1e-12, "duration__count": 30}
    fp16 = {"engine__precision": "fp16"}
    lora = {"init": None, "tune__language__dora": True, "duration__count": 4}
    one: dict[str, Job] = {
        "plain": (recipe, "align", {}),
        "looked": (looked_into(recipe, "looked"), "align", {}),
        "patience": (
            validated(
                recipe, "patience", validation__early_stopping={"patience": 2}, checkpoint__finish_with="best",
                checkpoint__keep=1, **still,
            ),
            "align", {},
        ),
        "metric": (validated(recipe, "metric", checkpoint__keep=1), "align", {"stop_after": 4}),
        "fp16": (vary(recipe, "fp16", "align", **fp16), "align", {}),
        "full": (vary(recipe, "full", "align"), "align", {"change": (fill_disk, (4,))}),
        "dora": (vary(recipe, "dora", "lora", **lora), "lora", {}),
    }  # fmt: skip
    elastic, elastic_1, elastic_2 = (
        vary(recipe, "elastic", "align", engine__zero=zero) for zero in ("zero3", "zero0", "zero1")
    )
    two: dict[str, Job] = {
        "looked_zero3": (looked_into(recipe, "looked_zero3", engine__zero="zero3"), "align", {}),
        "mixed_zero3": (vary(mixed, "mixed_zero3", "align", engine__zero="zero3"), "align", {}),
        "overflow": (vary(recipe, "overflow", "align", **fp16), "align", {"change": (overflow, (3,))}),
        "stopped": (
            vary(recipe, "stopped", "align", data__num_workers=1), "align",
            {"change": (ask_to_stop, (3, signal.SIGUSR1, 1))},
        ),
        "elastic": (elastic, "align", {"stop_after": 2}),
    }  # fmt: skip
    run_on_ranks(2, train_all, list(two.values()))
    again = [(recipe, 4), (two["mixed_zero3"][0], 1)]
    deaf: Job = (vary(recipe, "deaf", "align"), "align", {"change": (deafen, ("projector.linear_1.weight",))})
    by_accuracy = {"validation__metric": "validation/token_accuracy", "checkpoint__finish_with": "best"}
    metric = validated(recipe, "metric", checkpoint__keep=1, **by_accuracy)
    jobs = [*one.values(), (elastic_1, "align", {"stop_after": 4}), (metric, "align", {})]
    (found,) = run_on_ranks(1, train_and_replay, jobs, again, deaf)
    run_on_ranks(2, train_all, [(elastic_2, "align", {}), (*two["stopped"][:2], {})])
    return {name: job[0] for name, job in {**one, **two}.items()} | found


def stage_of(recipe: dict[str, Any], stage: str = "align") -> Path:
    return Path(recipe["run"]) / stage


def test_another_metric_is_not_compared_with_the_best_before(runs: dict[str, dict[str, Any]]) -> None:
    """The loss falls from step to step, and an accuracy is always below it: each has its own best checkpoint."""
    folder = stage_of(runs["metric"])
    finished = json.loads((folder / "finished.json").read_text())
    newest = json.loads((folder / "checkpoints/step_000006/state.json").read_text())["best"]
    (loss,) = newest["others"].values()
    assert newest["measure"].startswith("validation/token_accuracy ")
    assert loss["measure"].startswith("validation/loss ")
    lines = {line["step"]: line for line in read_lines(folder / "validation.jsonl")}
    assert loss["value"] == min(lines[step]["validation/loss"] for step in (1, 2, 3, 4))
    later = {step: lines[step]["validation/token_accuracy"] for step in (4, 5, 6)}
    assert finished["checkpoint"] == f"step_{max(later, key=lambda step: (later[step], -step)):06d}"
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {
        finished["checkpoint"], "step_000006", f"step_{loss['step']:06d}",
    }  # fmt: skip


def test_looking_changes_nothing(runs: dict[str, dict[str, Any]]) -> None:
    """Validation, answers, histograms and token tables: the weights are those of a run without, bit for bit."""
    assert losses(runs["looked"], "align") == losses(runs["plain"], "align")
    same_weights(runs["looked"], runs["plain"], "align", rtol=0, atol=0)


def test_what_is_seen_does_not_depend_on_ranks_and_zero_stage(runs: dict[str, dict[str, Any]]) -> None:
    one, three = (stage_of(runs[name]) for name in ("looked", "looked_zero3"))
    (seen,), (seen_3,) = (
        [line for line in read_lines(folder / "insight/histograms.jsonl") if line["step"] == 3]
        for folder in (one, three)
    )
    assert seen.keys() == seen_3.keys()
    names = [name for name in seen if name != "step"]
    assert {name.split("/")[0] for name in names} == {"weights", "gradients"}
    for name in names:
        assert sum(seen[name]["counts"]) == sum(seen_3[name]["counts"]) > 0
        assert seen[name]["edges"] == pytest.approx(seen_3[name]["edges"], rel=1e-3, abs=1e-6)
    for folder in (one, three):
        assert (folder / "insight/tokens_step_000004.html").is_file()
        assert list((folder / "tensorboard").iterdir())
    first, first_3 = (read_lines(folder / "validation.jsonl") for folder in (one, three))
    assert [line["step"] for line in first] == [line["step"] for line in first_3] == [1, 2, 3, 4, 5, 6]
    for left, right in zip(first, first_3, strict=True):
        assert left["validation/loss"] == pytest.approx(right["validation/loss"], rel=1e-4)


def test_the_log_says_what_a_step_cost(runs: dict[str, dict[str, Any]]) -> None:
    line = read_lines(stage_of(runs["plain"]) / "metrics.jsonl")[-1]
    for name in ("loss", "learning_rate/projector", "gradient_norm/projector", "tokens_per_s", "samples_per_s",
                 "needed_tflops_per_s", "memory/rss_gb"):  # fmt: skip
        assert line[name] > 0, name
    assert 0 <= line["data_wait_share"] <= 1
    assert 0 <= line["padding_share"] < 1
    assert "mfu" not in line  # a CPU has no peak to compare with


def test_patience_ends_a_stage_whose_best_is_what_it_finishes_with(runs: dict[str, dict[str, Any]]) -> None:
    folder = stage_of(runs["patience"])
    seen = [line["validation/loss"] for line in read_lines(folder / "validation.jsonl")]
    assert seen == [seen[0]] * 3  # a learning rate too small to move a weight: the first is the best, two are patience
    finished = json.loads((folder / "finished.json").read_text())
    assert finished == {"checkpoint": "step_000001", "steps": 3, "samples": 12}
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"step_000001", "step_000003"}


def test_fp16_trains_and_an_overflow_costs_no_data(runs: dict[str, dict[str, Any]]) -> None:
    plain, half, overflown = (losses(runs[name], "align") for name in ("plain", "fp16", "overflow"))
    assert half == pytest.approx(plain, rel=5e-3)
    assert overflown == pytest.approx(plain, rel=5e-3)
    scales = [line["loss_scale"] for line in read_lines(stage_of(runs["overflow"]) / "metrics.jsonl")]
    assert scales == [2.0**15] * 3 + [2.0**14] * 3  # the first batch alone overflows at 2^16
    assert audit(stage_of(runs["overflow"])).is_clean


def test_a_full_disk_costs_a_checkpoint_and_nothing_else(runs: dict[str, Any]) -> None:
    held = sorted(path.name for path in (stage_of(runs["full"]) / "checkpoints").iterdir())
    assert held == ["step_000002", "step_000006"]
    same_weights(runs["full"], runs["plain"], "align", rtol=0, atol=0)


def test_a_tensor_that_never_gets_a_gradient_is_named(runs: dict[str, Any]) -> None:
    assert runs["deaf"].startswith("step 1: projector.linear_1.weight got no gradient and would never learn")


def test_dora_learns_magnitudes_too(runs: dict[str, dict[str, Any]]) -> None:
    adapted = weights(runs["dora"], "lora")
    assert sum("lora_magnitude_vector" in name for name in adapted) == 14
    assert losses(runs["dora"], "lora")[-1] < losses(runs["dora"], "lora")[0]


def test_a_signal_on_one_rank_stops_all_at_one_step(runs: dict[str, dict[str, Any]]) -> None:
    """Step 4 was being computed; the second start took it from there, with data workers."""
    restarts = sorted((stage_of(runs["stopped"]) / "ledger").glob("attempt_*"))
    steps = [[line["step"] for line in ledger_lines(restart / "rank_00001.blocks")] for restart in restarts]
    assert steps == [[1, 2, 3, 4], [5, 6]]
    same_weights(runs["stopped"], runs["plain"], "align", rtol=2e-4, atol=2e-5)


def test_two_ranks_then_one_then_two_is_one_throughout(runs: dict[str, dict[str, Any]]) -> None:
    """And ZeRO-3, then 0, then 1."""
    assert losses(runs["elastic"], "align") == pytest.approx(losses(runs["plain"], "align"), rel=1e-5)
    same_weights(runs["elastic"], runs["plain"], "align", rtol=2e-4, atol=2e-5)
    account = audit(stage_of(runs["elastic"]))
    assert account.is_clean
    assert account.num_restarts == 3


@pytest.mark.parametrize("name", ["elastic", "stopped", "patience", "mixed_zero3"])
def test_an_audit_balances_and_finds_what_is_missing(runs: dict[str, dict[str, Any]], name: str) -> None:
    folder = stage_of(runs[name])
    assert audit(folder).is_clean
    (last,) = sorted((folder / "ledger").glob("attempt_*/rank_00000.blocks"))[-1:]
    told, lines = last.read_bytes(), ledger_lines(last)
    try:
        last.write_bytes(block_of_lines(lines[:-1]).to_bytes())
        assert audit(folder).missing_batches
        lines[-1]["draws"][0] = [lines[-1]["draws"][0][0], 0]  # its slot's very first draw, once more
        last.write_bytes(block_of_lines(lines).to_bytes())
        account = audit(folder)
        assert account.lost
        assert account.repeated
    finally:
        last.write_bytes(told)


def test_a_replay_gives_rows_and_loss_again(runs: dict[str, Any]) -> None:
    """Of one rank, from a checkpoint, bit for bit; of two ranks under ZeRO-3, from the start, to rounding."""
    plain, zero3 = runs["replays"]
    assert plain == (True, 0.0)
    assert zero3[0]
    assert zero3[1] < 1e-5
