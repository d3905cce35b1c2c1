"""Preflight's memory and traffic beside bytes that are counted: tensors of two ranks, and their collectives."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.backbones import tiny_recipe
from tests.support.ranks import run_on_ranks
from tests.support.shards import write_set
from tests.support.training import vary
from tests.support.wire import Wire
from tests.trainer.engine.test_masters import NUM_WEIGHTS, build, micro_batches
from tools.preflight.geometry import PartCount, count_parts
from tools.preflight.memory import Storage, states, storage
from tools.preflight.wire import traffic
from trainer.config.recipe import Recipe
from trainer.config.schema import DS_CONFIGS
from trainer.distributed.context import DistributedContext
from trainer.engine import deepspeed_config
from trainer.engine.process_group import leave_distributed, start_distributed

FULL = {"kind": "full", "learning_rate": 1e-4}
SHIPPED = deepspeed_config.read_json


def all_gathered(directory: Path, name: str) -> dict[str, Any]:
    """A ds_config under which ZeRO-3 keeps no small weight gathered: tiny models have no other ones."""
    settings: dict[str, Any] = SHIPPED(directory, name)
    if settings["zero_optimization"]["stage"] == 3:
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return settings


def tensor_bytes() -> int:
    """Of all tensors of this process, each storage once; small ones are counters and ranks' numbers."""
    gc.collect()
    storages = {}
    for each in gc.get_objects():
        if type(each) in (torch.Tensor, torch.nn.Parameter):
            found = each.untyped_storage()
            storages[found.data_ptr()] = found.nbytes()
    return sum(size for size in storages.values() if size > 4096)


def kept(ranks: DistributedContext, cases: list[tuple[str, bool]]) -> dict[tuple[str, bool], float]:
    """Bytes a trained weight that an engine keeps at the end of a step's last backward, by ds_config and masters."""
    start_distributed(ranks, 60.0)
    deepspeed_config.read_json = all_gathered  # type: ignore[assignment]
    found = {}
    for zero, masters in cases:
        before = tensor_bytes()
        engine, exact = build(ranks, zero, masters=masters)
        exact.clear()
        micro_batches(ranks, engine)
        engine.step(1.0, 1.0)
        micro_batches(ranks, engine)
        found[zero, masters] = (tensor_bytes() - before) / NUM_WEIGHTS
        engine.step(1.0, 1.0)
        engine.close()
        del engine
    leave_distributed()
    return found


@pytest.mark.slow
def test_what_learns_takes_what_is_estimated() -> None:
    """`zero2` adds up micro-batches as ZeRO-1 here; buckets are given up after a backward."""
    cases = [(zero, masters) for zero in ("zero0", "zero1", "zero2", "zero3") for masters in (False, True)]
    cases.remove(("zero0", True))
    found = run_on_ranks(2, kept, cases)[0]
    counts = {"language": PartCount(frozen=0, trained=NUM_WEIGHTS)}
    expected = {}
    for zero, masters in cases:
        number = {"zero0": 0, "zero1": 1, "zero2": 1, "zero3": 3}[zero]
        parts = states(counts, 2, Storage(number, 2, masters, {}), load="full")
        expected[zero, masters] = (sum(parts.values()) - parts["ZeRO's buckets"]) / NUM_WEIGHTS
    assert found == pytest.approx(expected, rel=0.1)


def moved(ranks: DistributedContext, recipes: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Of each recipe's second step of `lora`: bytes gathered and reduced, and the parameters by part."""
    from trainer.build import build_stage
    from trainer.loop import Loop
    from trainer.step import next_batch

    found = []
    for recipe in recipes:
        deepspeed_config.read_json = all_gathered  # type: ignore[assignment]
        opened = build_stage(Recipe.model_validate_json(json.dumps(recipe)), "lora", ranks)
        try:
            step, state = Loop(opened).step, opened.state
            step.take(next_batch(state.stream, ranks), state.consumed, 1.0)
            batch = next_batch(state.stream, ranks)
            with Wire() as wire:
                step.take(batch, state.consumed, 1.0)
            sizes: dict[str, float] = dict(wire.num_bytes)
            for name, value in opened.services.engine.module.vlm.named_parameters():
                key = f"{name.partition('.')[0]}/{'trained' if value.requires_grad else 'frozen'}"
                sizes[key] = sizes.get(key, 0) + int(getattr(value, "ds_numel", value.numel()))
            found.append(sizes)
        finally:
            opened.close()
    return found


@pytest.mark.slow
def test_a_step_moves_what_is_computed(tmp_path: Path) -> None:
    """A projector, adapters, and a language model in full, in bf16, under three ZeRO stages, of two micro-batches.

    ZeRO-3 keeps what is gathered, up to 10^9 elements: so small a model is gathered once in a micro-batch.
    """
    write_set(tmp_path / "shards", [5, 1, 9])
    recipe = tiny_recipe(tmp_path, tmp_path / "shards")
    plans = {
        "align": {"projector": FULL},
        "lora": recipe["stages"]["lora"]["tune"],
        "full": {"projector": FULL, "language": FULL},
    }
    cases = [(name, zero) for name in plans for zero in ("zero1", "zero2", "zero3")]
    common = {"init": None, "engine__precision": "bf16", "batch__micro_rows": 1}
    made = [
        vary(recipe, f"{name}_{zero}", "lora", tune=plans[name], engine__zero=zero, **common) for name, zero in cases
    ]
    counted, expected = {}, {}
    for case, values, found in zip(cases, made, run_on_ranks(2, moved, made)[0], strict=True):
        parsed = Recipe.model_validate_json(json.dumps(values))
        stage, counts = parsed.stage("lora"), count_parts(parsed.model, parsed.stage("lora").tune)
        for part, count in counts.items():
            assert (count.frozen, count.trained) == (found.get(f"{part}/frozen", 0), found.get(f"{part}/trained", 0))
        trained = sum(part.trained for part in counts.values())
        settings = all_gathered(DS_CONFIGS, f"{stage.engine.zero}.json")
        stored = storage(stage, settings, trained, 2)
        step = traffic(counts, stage, stored, load="full")
        for kind, computed in (("reduced", step.reduced), ("gathered", step.gathered)):
            counted[(*case, kind)], expected[(*case, kind)] = found[kind], computed
    # What is left over are sums of a few numbers, 56 bytes a micro-batch; a tiny model has few others.
    assert counted == pytest.approx(expected, rel=0.02)
