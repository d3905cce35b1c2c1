"""One run, however it is cut: over ZeRO stages, ranks, micro-batches, packing, and over a kill and a resumption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from models.common.files import read_lines
from tests.support.backbones import tiny_recipe
from tests.support.paths import REPOSITORY
from tests.support.ranks import run_on_ranks
from tests.support.shards import write_mixed_set, write_set
from tests.support.training import losses, same_weights, train_all, vary, weights
from trainer.distributed.context import DistributedContext

Job = tuple[dict[str, Any], str, dict[str, Any]]
OFFLOADS = ("zero2_offload", "zero3_offload")
ZEROS = ("zero0", "zero1", "zero2", "zero3")

# Sums in another order differ in the last bits of fp32, and Adam divides by the root of a small second moment in the
# first steps, which enlarges them.
ROUNDING = {"rtol": 2e-4, "atol": 2e-5}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("equivalence")
    write_set(folder / "shards", [5, 1, 9])
    write_mixed_set(folder / "mixed")
    return tiny_recipe(folder, folder / "shards")


@pytest.fixture(scope="module")
def runs(recipe: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every run that the tests compare, made in process groups of two ranks, of one, and of two again."""
    one: dict[str, Job] = {"one": (recipe, "align", {})}
    two: dict[str, Job] = {}
    for zero in ZEROS:
        one[f"one_{zero}"] = (vary(recipe, f"one_{zero}", "align", engine__zero=zero), "align", {})
        two[f"two_{zero}"] = (vary(recipe, f"two_{zero}", "align", engine__zero=zero), "align", {})
        broken = vary(recipe, f"broken_{zero}", "align", engine__zero=zero)
        one[f"broken_{zero}_1"] = (broken, "align", {"stop_after": 3})
        one[f"broken_{zero}"] = (broken, "align", {})
        whole = vary(recipe, f"whole_bf16_{zero}", "align", engine__zero=zero, engine__precision="bf16")
        half = vary(recipe, f"half_bf16_{zero}", "align", engine__zero=zero, engine__precision="bf16")
        two[f"whole_bf16_{zero}"] = (whole, "align", {})
        two[f"half_bf16_{zero}_1"] = (half, "align", {"stop_after": 3})
        two[f"half_bf16_{zero}"] = (half, "align", {})
    one["micro_1"] = (vary(recipe, "micro_1", "align", batch__micro_rows=1), "align", {})
    one["micro_4"] = (vary(recipe, "micro_4", "align", batch__micro_rows=4), "align", {})
    one["lora"] = (recipe, "lora", {})
    for zero in OFFLOADS:
        one[zero] = (vary(recipe, zero, "align", engine__zero=zero), "align", {})
    for precision in ("fp32", "bf16"):
        changes = {"engine__precision": precision, "tune__language__dropout": 0.1}
        whole = vary(recipe, f"whole_{precision}", "lora", init=None, **changes)
        broken = vary(recipe, f"broken_{precision}", "lora", init=None, **changes)
        two[f"whole_{precision}"] = (whole, "lora", {})
        two[f"broken_{precision}_1"] = (broken, "lora", {"stop_after": 3})
        two[f"broken_{precision}_2"] = (broken, "lora", {})
    mixed: dict[str, Any] = {"data__sources": [{"path": str(Path(recipe["run"]).parent / "mixed")}]}
    packed = {**mixed, "data__packing": {"kind": "pack", "row_tokens": 256, "lookahead": 3}}
    for name, changes in (("mixed", mixed), ("packed", packed)):
        one[f"{name}_1"] = (vary(recipe, f"{name}_1", "align", **changes), "align", {})
        divided = {**changes, "engine__zero": "zero3", "batch__micro_rows": 1}
        two[f"{name}_2"] = (vary(recipe, f"{name}_2", "align", **divided), "align", {})
    elastic = vary(recipe, "elastic", "align")
    two["elastic"] = (elastic, "align", {"stop_after": 2})
    torch.manual_seed(0)
    run_on_ranks(2, train_all, list(two.values()))
    run_on_ranks(1, train_all, [*one.values(), (elastic, "align", {"stop_after": 4})])
    run_on_ranks(2, train_all, [(elastic, "align", {})])
    return {name: job[0] for name, job in {**one, **two}.items()}


@pytest.mark.slow
def test_the_loss_falls(runs: dict[str, dict[str, Any]]) -> None:
    trace = losses(runs["one"], "align")
    assert len(trace) == 6
    assert trace[-1] < trace[0] - 0.3


@pytest.mark.slow
@pytest.mark.parametrize("zero", ZEROS)
@pytest.mark.parametrize("ranks", ["one", "two"])
def test_zero_stage_and_world_size_change_nothing(runs: dict[str, dict[str, Any]], zero: str, ranks: str) -> None:
    assert losses(runs[f"{ranks}_{zero}"], "align") == pytest.approx(losses(runs["one"], "align"), rel=1e-5)
    same_weights(runs[f"{ranks}_{zero}"], runs["one"], "align", **ROUNDING)


@pytest.mark.slow
@pytest.mark.parametrize("zero", OFFLOADS)
def test_offloading_changes_nothing(runs: dict[str, dict[str, Any]], zero: str) -> None:
    assert losses(runs[zero], "align") == pytest.approx(losses(runs["one"], "align"), rel=1e-5)
    same_weights(runs[zero], runs["one"], "align", **ROUNDING)


def test_every_shipped_engine_configuration_is_run_here() -> None:
    shipped = {file.stem for file in (REPOSITORY / "ds_configs").glob("*.json")}
    assert shipped == {*ZEROS, *OFFLOADS}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["micro_1", "micro_4"])
def test_micro_batch_against_accumulation_changes_nothing(runs: dict[str, dict[str, Any]], name: str) -> None:
    assert losses(runs[name], "align") == pytest.approx(losses(runs["one"], "align"), rel=1e-5)
    same_weights(runs[name], runs["one"], "align", **ROUNDING)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resumed_is_uninterrupted_bit_for_bit(runs: dict[str, dict[str, Any]], precision: str) -> None:
    whole, broken = runs[f"whole_{precision}"], runs[f"broken_{precision}_2"]
    assert losses(broken, "lora") == losses(whole, "lora")
    same_weights(broken, whole, "lora", rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("zero", ZEROS)
def test_resumed_is_uninterrupted_under_every_zero_stage(runs: dict[str, dict[str, Any]], zero: str) -> None:
    """In fp32 on one rank, and in bf16 on two."""
    assert losses(runs[f"broken_{zero}"], "align") == losses(runs[f"one_{zero}"], "align")
    same_weights(runs[f"broken_{zero}"], runs[f"one_{zero}"], "align", rtol=0, atol=0)
    assert losses(runs[f"half_bf16_{zero}"], "align") == losses(runs[f"whole_bf16_{zero}"], "align")
    same_weights(runs[f"half_bf16_{zero}"], runs[f"whole_bf16_{zero}"], "align", rtol=0, atol=0)


@pytest.mark.slow
def test_two_ranks_then_one_then_two_are_one_rank_throughout(runs: dict[str, dict[str, Any]]) -> None:
    assert losses(runs["elastic"], "align") == pytest.approx(losses(runs["one"], "align"), rel=1e-5)
    same_weights(runs["elastic"], runs["one"], "align", **ROUNDING)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixed", "packed"])
def test_rows_without_images_hold_nobody_up(runs: dict[str, dict[str, Any]], name: str) -> None:
    """Padded and packed, on two ranks under ZeRO-3: also where one of them has no image at all."""
    assert losses(runs[f"{name}_2"], "align") == pytest.approx(losses(runs[f"{name}_1"], "align"), rel=1e-5)
    same_weights(runs[f"{name}_2"], runs[f"{name}_1"], "align", **ROUNDING)


@pytest.mark.slow
def test_a_packed_row_holds_several_samples(runs: dict[str, dict[str, Any]]) -> None:
    lines = [read_lines(Path(runs[name]["run"]) / "align" / "metrics.jsonl") for name in ("mixed_1", "packed_1")]
    assert lines[1][-1]["samples"] > 1.5 * lines[0][-1]["samples"]


@pytest.mark.slow
def test_lora_starts_from_the_aligned_projector_and_learns(runs: dict[str, dict[str, Any]]) -> None:
    aligned, adapted = weights(runs["one"], "align"), weights(runs["lora"], "lora")
    assert set(aligned) < set(adapted)
    assert losses(runs["lora"], "lora")[0] < losses(runs["one"], "align")[0]
    up = [value for name, value in adapted.items() if "lora_B" in name]
    assert len(up) == 14  # seven linear layers in each of two decoder layers
    assert all(float(value.norm()) > 0 for value in up)


@pytest.mark.slow
def test_a_checkpoint_holds_what_learns_and_no_more(runs: dict[str, dict[str, Any]]) -> None:
    num_bytes = sum(
        file.stat().st_size for file in Path(runs["one"]["run"]).glob("align/checkpoints/step_000006/*.safetensors")
    )
    num_elements = sum(value.numel() for value in weights(runs["one"], "align").values())
    assert num_bytes < 1.1 * 12 * num_elements + 4096  # fp32 weight and two moments


def test_ranks_share_the_rows_without_gap_or_overlap() -> None:
    for num_slots in (1, 4, 7, 256):
        for world_size in (1, 2, 3, 8):
            shares = [
                slot
                for rank in range(world_size)
                for slot in DistributedContext(rank, world_size).local_rows(num_slots)
            ]
            assert shares == list(range(num_slots))
