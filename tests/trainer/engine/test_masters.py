"""bf16 parameters with fp32 masters under every ZeRO stage: what goes over the wire, what is kept, how a step sums."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.ranks import run_on_ranks
from tests.support.wire import Wire
from trainer.config.schema import AdamW, EngineConfig, StageConfig
from trainer.distributed.context import DistributedContext
from trainer.engine import deepspeed_config
from trainer.engine.engine import Engine, build_engine
from trainer.engine.masters import Exact, filler, has_masters, narrow
from trainer.engine.process_group import leave_distributed, start_distributed
from trainer.engine.tuning import ParameterGroup
from trainer.objectives.loss_sum import LossSum

ZEROS = ("zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")
WIDTH, NUM_LAYERS = 512, 3
NUM_WEIGHTS = NUM_LAYERS * WIDTH * WIDTH
"""A layer is larger than what ZeRO-3 keeps gathered (100,000 elements)."""


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(NUM_LAYERS))

    def forward(self, numbers: Tensor) -> LossSum:
        with torch.autocast("cpu", torch.bfloat16):
            for layer in self.layers:
                numbers = torch.tanh(layer(numbers))
            loss = numbers.float().square().sum()
        return LossSum(loss, torch.zeros(()), loss.detach().reshape(1))


def build(
    ranks: DistributedContext, zero: str, *, masters: bool, num_micro_batches: int = 2
) -> tuple[Engine, dict[str, Exact]]:
    """The engine, and the weights that bf16 does not hold, which are its masters."""
    module: Any = Layers()
    names, parameters = zip(*module.named_parameters(), strict=True)
    groups = [ParameterGroup("language", tuple(names), tuple(parameters), 1e-5, 0.0)]
    exact = narrow(groups) if masters else {}
    engine = build_engine(
        module,
        groups,
        config=EngineConfig.model_validate({"zero": zero, "precision": "bf16"}),
        optimizer=AdamW(clip_norm=None),
        micro_rows=1,
        num_micro_batches=num_micro_batches,
        ranks=ranks,
    )
    engine.set_masters(filler(exact), exact)
    return engine, exact


def rows(ranks: DistributedContext, index: int) -> Any:
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(10 * ranks.rank + index))


def micro_batches(ranks: DistributedContext, engine: Engine, num: int = 2) -> list[dict[str, float]]:
    """A step's micro-batches; what each moved, in bytes a trained weight."""
    found = []
    for index in range(num):
        with Wire() as wire:
            engine.backward(engine.forward(rows(ranks, index), is_last=index == num - 1).loss_sum, 1.0)
        found.append({kind: size / NUM_WEIGHTS for kind, size in wire.num_bytes.items()})
    return found


def whole(ranks: DistributedContext, engine: Engine, what: str) -> Tensor:
    """Masters or gradients of all ranks, as one vector in the order of names and places."""
    starts = {fragment.name: fragment.start for fragment in engine.fragments()}
    if what == "weights":
        local = [(each.name, each.start, each.weight.detach().clone()) for each in engine.fragments()]
    else:
        local = [(name, starts[name], piece.detach().clone()) for name, piece in engine.own_gradients()]
    pieces = sorted((each for found in ranks.gather(local) for each in found), key=lambda each: each[:2])
    return torch.cat([piece.float() for _, _, piece in pieces])


def measured(ranks: DistributedContext, zeros: tuple[str, ...]) -> dict[str, Any]:
    """By ZeRO stage: bytes of micro-batches and of the step, and how weights and gradients compare with fp32 ones."""
    start_distributed(ranks, 60.0)
    found: dict[str, Any] = {}
    plain, _ = build(ranks, "zero0", masters=False)
    initial = whole(ranks, plain, "weights")
    micro_batches(ranks, plain)
    gradient = whole(ranks, plain, "gradients")
    plain.close()
    for zero in zeros:
        engine, exact = build(ranks, zero, masters=True)
        at_start = whole(ranks, engine, "weights")
        wire = micro_batches(ranks, engine)
        own = whole(ranks, engine, "gradients")
        with Wire() as step:
            engine.step(1.0, 1.0)
        after = whole(ranks, engine, "weights")
        with engine.whole_weights():
            forward = torch.cat([each.detach().reshape(-1) for each in engine.module.parameters()])
        engine.set_weights(filler(dict(_named(initial))))
        found[zero] = {
            "wire": wire,
            "step": {kind: size / NUM_WEIGHTS for kind, size in step.num_bytes.items()},
            "exact at start": torch.equal(at_start, initial) and len(exact) == NUM_LAYERS,
            "cosine": float(torch.cosine_similarity(own, gradient, dim=0)),
            "moved": float((after - initial).abs().mean()),
            "forward is rounded": torch.equal(forward, after.bfloat16()),
            "set again": torch.equal(whole(ranks, engine, "weights"), initial),
        }
        engine.close()
    leave_distributed()
    return found


def _named(weights: Tensor) -> list[tuple[str, Exact]]:
    """A vector of `whole` by the parameters' names."""
    names = sorted(name for name, _ in Layers().named_parameters())
    return [(name, Exact(0, piece)) for name, piece in zip(names, weights.chunk(NUM_LAYERS), strict=True)]


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    results: dict[str, Any] = run_on_ranks(2, measured, ZEROS)[0]
    return results


@pytest.mark.slow
@pytest.mark.parametrize("zero", ZEROS)
def test_masters_are_exact_and_what_the_forward_uses_is_them_rounded(found: dict[str, Any], zero: str) -> None:
    """A step of 1e-5, far below bf16's grain for weights of 0.04, moves every master."""
    of = found[zero]
    assert of["exact at start"]
    assert of["forward is rounded"]
    assert of["set again"]
    assert of["moved"] == pytest.approx(1e-5, rel=0.05)
    assert of["cosine"] > 0.9995


@pytest.mark.slow
@pytest.mark.parametrize("zero", ZEROS)
def test_at_most_two_bytes_a_weight_and_direction_in_a_micro_batch(found: dict[str, Any], zero: str) -> None:
    """Forward and backward gather under ZeRO-3, and gradients are reduced; ZeRO-1 and 2 gather once, after the step."""
    of = found[zero]
    passes = 2 if "zero3" in zero else 0
    for micro_batch in of["wire"]:
        assert micro_batch.get("reduced", 0.0) <= 2.01
        assert micro_batch.get("gathered", 0.0) <= 2.01 * passes
    assert of["step"].get("gathered", 0.0) <= 2.01


def reduced_bytes(ranks: DistributedContext, limits: list[float]) -> list[list[float]]:
    """fp32 weights under ZeRO-2: what each of three micro-batches reduces, in bytes a weight, by the limit."""
    start_distributed(ranks, 60.0)
    found = []
    for limit in limits:
        deepspeed_config.REDUCED_ONCE_BYTES = limit
        engine, _ = build(ranks, "zero2", masters=False, num_micro_batches=3)
        found.append([each.get("reduced", 0.0) for each in micro_batches(ranks, engine, 3)])
        engine.step(1.0, 1.0)
        engine.close()
    leave_distributed()
    return found


@pytest.mark.slow
def test_gradients_that_fit_are_reduced_once_a_step() -> None:
    once, each = run_on_ranks(2, reduced_bytes, [4.0 * NUM_WEIGHTS, 4.0 * NUM_WEIGHTS - 1])[0]
    assert once == [0.0, 0.0, pytest.approx(4.0, rel=0.01)]
    assert each == [pytest.approx(4.0, rel=0.01)] * 3


def test_they_are_chosen_for_a_language_model_that_is_tuned_in_full_in_bf16() -> None:
    def chosen(tune: dict[str, Any], **engine: Any) -> bool:
        data = {"sources": [{"path": "none"}], "template": {"kind": "plain"}, "max_length": 64}
        stage = {"tune": tune, "data": data, "duration": {"unit": "steps", "count": 1}, "engine": engine}
        batch = {"global_rows": 1, "micro_rows": 1}
        return has_masters(StageConfig.model_validate({**stage, "batch": batch}, strict=False))

    full = {"kind": "full", "learning_rate": 1e-5}
    lora = {"kind": "lora", "learning_rate": 1e-4, "rank": 4, "alpha": 8}
    assert chosen({"language": full, "projector": full})
    assert not chosen({"language": full}, precision="fp32")
    assert not chosen({"language": full}, zero="zero0")
    assert not chosen({"language": lora, "projector": full})
    assert not chosen({"projector": full})
