"""The ZeRO backends around a module of three parameters: what DeepSpeed's private parts are taken to mean."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.ranks import run_on_ranks
from trainer.config.schema import AdamW, EngineConfig
from trainer.distributed.context import DistributedContext
from trainer.engine.engine import Engine, build_engine
from trainer.engine.process_group import leave_distributed, start_distributed
from trainer.engine.tuning import ParameterGroup
from trainer.objectives.loss_sum import LossSum

ZEROS = ("zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")
SHAPES = {"matrix": (3, 5), "bias": (3,), "one": (1,)}
"""19 elements, which two ranks cannot share evenly; under ZeRO-3 the second rank holds nothing of `one` but padding."""
FROZEN = torch.arange(5.0)
INPUT = torch.arange(1.0, 6.0)


class Affine(nn.Module):
    """(matrix (x + frozen) + bias) one, summed: every gradient is known."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Module()
        for name, value in initial().items():
            self.inner.register_parameter(name, nn.Parameter(value))
        self.frozen = nn.Parameter(FROZEN.clone(), requires_grad=False)

    def forward(self, numbers: Tensor) -> LossSum:
        matrix, bias, one = (getattr(self.inner, name) for name in SHAPES)
        loss = ((matrix @ (numbers + self.frozen) + bias) * one).sum()
        return LossSum(loss, torch.zeros(()), loss.detach().reshape(1))


def initial() -> dict[str, Tensor]:
    return {
        name: torch.arange(1.0, 1.0 + torch.Size(shape).numel()).reshape(shape) / 8 for name, shape in SHAPES.items()
    }


def expected_gradients(num_batches: int) -> dict[str, Tensor]:
    """Of `num_batches` times the same loss, whoever computed them."""
    module = Affine()
    (module(INPUT).loss_sum * num_batches).backward()
    return {name: value.grad for name, value in module.inner.named_parameters() if value.grad is not None}


def build(ranks: DistributedContext, zero: str) -> Engine:
    """Two groups, the matrix apart."""
    module: Any = Affine()
    own = dict(module.inner.named_parameters())
    groups = [
        ParameterGroup("projector", names, tuple(own[name] for name in names), 0.5, 0.0)
        for names in (("matrix",), ("bias", "one"))
    ]
    return build_engine(
        module,
        groups,
        config=EngineConfig.model_validate({"zero": zero, "precision": "fp32"}),
        optimizer=AdamW(clip_norm=None),
        micro_rows=1,
        num_micro_batches=2,
        ranks=ranks,
    )


def accumulate(engine: Engine) -> None:
    """Two micro-batches on every rank, with the whole global batch's target count 1."""
    numbers: Any = INPUT
    for is_last in (False, True):
        engine.backward(engine.forward(numbers, is_last=is_last).loss_sum, 1.0)


def joined(ranks: DistributedContext, slices: Iterable[tuple[str, int, Tensor]]) -> dict[str, Tensor]:
    """Whole tensors from the slices of all ranks; every element must come exactly once."""
    local = [(name, start, values.detach().clone()) for name, start, values in slices]
    whole: dict[str, Tensor] = {}
    for name, shape in SHAPES.items():
        flat, times = torch.zeros(torch.Size(shape).numel()), torch.zeros(torch.Size(shape).numel())
        for found in ranks.gather(local):
            for _, start, values in (item for item in found if item[0] == name):
                flat[start : start + values.numel()] += values
                times[start : start + values.numel()] += 1
        assert times.tolist() == [1.0] * len(times), (name, times)
        whole[name] = flat.reshape(shape)
    return whole


def weights(ranks: DistributedContext, engine: Engine) -> dict[str, Tensor]:
    return joined(ranks, ((piece.name, piece.start, piece.weight) for piece in engine.fragments()))


def own_gradients(ranks: DistributedContext, engine: Engine) -> dict[str, Tensor]:
    starts = {fragment.name: fragment.start for fragment in engine.fragments()}
    return joined(ranks, ((name, starts[name], piece) for name, piece in engine.own_gradients()))


def moments(ranks: DistributedContext, engine: Engine) -> dict[str, dict[str, Tensor]]:
    kinds = {kind for fragment in engine.fragments() for kind in fragment.moments}
    kinds = set().union(*ranks.gather(kinds))
    return {
        kind: joined(ranks, ((piece.name, piece.start, piece.moments[kind]) for piece in engine.fragments()))
        for kind in sorted(kinds)
    }


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    for name in SHAPES:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=0, msg=lambda text: f"{what}: {text}")


def check_backends(ranks: DistributedContext, zeros: tuple[str, ...]) -> None:
    start_distributed(ranks, 60.0)
    for zero in zeros:
        engine = build(ranks, zero)
        check_shards_and_gradients(ranks, engine, zero)
        check_discard(ranks, engine, zero)
        check_whole_weights(ranks, engine, zero)
        check_set_weights(ranks, engine, zero)
        check_moments(ranks, engine, zero)
        engine.close()
    leave_distributed()


def check_shards_and_gradients(ranks: DistributedContext, engine: Engine, zero: str) -> None:
    """The ranks' slices make up the weights that were put in and the gradient that autograd gives."""
    assert_equal(weights(ranks, engine), initial(), f"{zero}: weights")
    assert moments(ranks, engine) == {}
    accumulate(engine)
    expected = expected_gradients(2 * ranks.world_size)
    assert_equal(own_gradients(ranks, engine), expected, f"{zero}: gradients")
    squares = ranks.sum(engine.squared_norms())
    assert squares[0] == pytest.approx(float(expected["matrix"].square().sum()), rel=1e-6)
    assert squares[1] == pytest.approx(sum(float(expected[name].square().sum()) for name in ("bias", "one")), rel=1e-6)


def check_discard(ranks: DistributedContext, engine: Engine, zero: str) -> None:
    """Nothing of a discarded gradient is in the weights, in the moments or in the next gradient."""
    engine.discard()
    assert_equal(weights(ranks, engine), initial(), f"{zero}: weights after discard")
    assert engine.num_updates == 0
    accumulate(engine)
    expected = expected_gradients(2 * ranks.world_size)
    assert_equal(own_gradients(ranks, engine), expected, f"{zero}: gradients after discard")
    engine.step(0.1, 1.0)
    # Adam's first step moves every element by its learning rate: 0.5 x 0.1.
    moved = {name: value - 0.05 for name, value in initial().items()}
    for name, value in weights(ranks, engine).items():
        torch.testing.assert_close(value, moved[name], rtol=0, atol=1e-6)
    assert engine.num_updates == 1


def check_whole_weights(ranks: DistributedContext, engine: Engine, zero: str) -> None:
    """One rank alone computes with whole weights, frozen ones included; afterwards training goes on."""
    expected = weights(ranks, engine)
    for _ in range(2):
        with engine.whole_weights():
            module: Any = engine.module
            found = {name: value.detach().clone() for name, value in module.inner.named_parameters()}
            assert torch.equal(module.frozen, FROZEN)
            if ranks.is_first:
                with torch.no_grad():
                    module(INPUT)
        assert_equal(found, expected, f"{zero}: whole weights")
    accumulate(engine)
    engine.discard()


def fill(values: dict[str, Any], targets: Any) -> None:
    """As a checkpoint's reader fills slices."""
    for name, start, target in targets:
        target.copy_(values[name].reshape(-1)[start : start + target.numel()])


def check_set_weights(ranks: DistributedContext, engine: Engine, zero: str) -> None:
    """What is set is in the slices, in the forward and in the next step's start."""
    wanted = {name: value * -2 for name, value in initial().items()}
    engine.set_weights(lambda _, targets: fill(wanted, targets))
    assert_equal(weights(ranks, engine), wanted, f"{zero}: weights that were set")
    numbers: Any = INPUT
    matrix, bias, one = wanted.values()
    loss = float(engine.evaluate(numbers).loss_sum)
    assert loss == pytest.approx(float(((matrix @ (INPUT + FROZEN) + bias) * one).sum()), rel=1e-5)
    accumulate(engine)
    engine.step(0.0, 1.0)  # at a rate of 0 weights stay, moments move
    assert_equal(weights(ranks, engine), wanted, f"{zero}: weights after a step at rate 0")


def check_moments(ranks: DistributedContext, engine: Engine, zero: str) -> None:
    """What `load_moments` read by name and position comes back from `fragments`."""
    assert set(moments(ranks, engine)) == {"exp_avg", "exp_avg_sq"}
    saved = {
        kind: {name: value + ord(kind[-1]) for name, value in initial().items()} for kind in ("exp_avg", "exp_avg_sq")
    }
    engine.load_moments(lambda kind, targets: fill(saved[kind], targets), 7)
    assert engine.num_updates == 7
    for kind, found in moments(ranks, engine).items():
        assert_equal(found, saved[kind], f"{zero}: {kind}")


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_slices_gradients_and_weights_are_those_of_the_whole_module(world_size: int) -> None:
    """Under every ZeRO stage, for one and two ranks: the same weights, gradients and moments as without DeepSpeed."""
    run_on_ranks(world_size, check_backends, ZEROS)
