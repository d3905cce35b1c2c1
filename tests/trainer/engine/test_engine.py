"""The engine: what its optimizer is given under every ZeRO stage, and what it decides itself, over a fake backend."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.common.errors import InputError
from tests.support.ranks import run_on_ranks
from trainer.config.schema import AdamW, EngineConfig
from trainer.distributed.context import DistributedContext
from trainer.engine import deepspeed_config
from trainer.engine.engine import Engine, build_engine
from trainer.engine.process_group import leave_distributed, start_distributed
from trainer.engine.tuning import ParameterGroup
from trainer.engine.zero import ParamShard
from trainer.objectives.loss_sum import LossSum

ZEROS = ("zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")
NUM_WEIGHTS = 8


class Sum(nn.Module):
    """Loss = sum of weights x the batch's numbers, so the batch is the gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(float(NUM_WEIGHTS)))

    def forward(self, numbers: Tensor) -> LossSum:
        loss = (self.weight * numbers).sum()
        return LossSum(loss, torch.zeros(()), loss.detach().reshape(1))


def norms_of_steps(ranks: DistributedContext, cases: list[tuple[str, float | None]], norm: float) -> list[float]:
    """For each (ZeRO stage, clipping norm): the gradient norm that the optimizer was given, over all ranks."""
    start_distributed(ranks, 60.0)
    found = []
    for zero, clip_norm in cases:
        module = Sum()
        parameters = tuple(module.parameters())
        engine = build_engine(
            module,  # type: ignore[arg-type]
            [ParameterGroup("projector", ("weight",), parameters, 1.0, 0.0)],
            config=EngineConfig.model_validate({"zero": zero, "precision": "fp32"}),
            optimizer=AdamW(clip_norm=clip_norm),
            micro_rows=1,
            num_micro_batches=1,
            ranks=ranks,
        )
        seen: list[float] = []
        engine._adam.register_step_pre_hook(lambda adam, *_, seen=seen: seen.append(_squared_norm(adam)))
        # Every rank's numbers are added up: each gives its share of a gradient of the norm that was asked for.
        numbers = torch.full((NUM_WEIGHTS,), norm / math.sqrt(NUM_WEIGHTS) / ranks.world_size)
        engine.backward(engine.forward(numbers, is_last=True).loss_sum, 1.0)  # type: ignore[arg-type]
        whole = math.sqrt(sum(ranks.sum(engine.squared_norms())))
        engine.step(0.1, whole, 1.0)
        copies = ranks.world_size if zero == "zero0" else 1
        found.append(math.sqrt(ranks.sum([sum(seen)])[0] / copies))
        engine.close()
    leave_distributed()
    return found


def _squared_norm(adam: torch.optim.Optimizer) -> float:
    gradients = [value.grad for group in adam.param_groups for value in group["params"] if value.grad is not None]
    return sum(float(gradient.double().square().sum()) for gradient in gradients)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_adam_is_given_the_norm_that_the_recipe_says(world_size: int) -> None:
    """No clipping: 800 stays 800, whatever DeepSpeed's default is; 5 gives 5; a norm within the limit is untouched."""
    cases = [(zero, clip_norm) for zero in ZEROS for clip_norm in (None, 5.0, 1000.0)]
    found = run_on_ranks(world_size, norms_of_steps, cases, 800.0)[0]
    expected = [800.0 if clip_norm != 5.0 else 5.0 for _, clip_norm in cases]
    assert dict(zip(cases, found, strict=True)) == pytest.approx(dict(zip(cases, expected, strict=True)), rel=1e-5)


def test_a_settings_file_that_clips_beside_the_recipe_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = json.loads((deepspeed_config.DS_CONFIGS / "zero2.json").read_text())
    (tmp_path / "zero2.json").write_text(json.dumps({**settings, "gradient_clipping": 1.0}))
    monkeypatch.setattr(deepspeed_config, "DS_CONFIGS", tmp_path)
    with pytest.raises(InputError, match=r"zero2.json: gradient_clipping is 1.0; the recipe sets clipping"):
        deepspeed_config.deepspeed_config(
            EngineConfig(), clip_norm=None, micro_rows=1, num_micro_batches=1, world_size=1
        )


class FakeDeepSpeed:
    """Stands for DeepSpeed's engine where only its answer about a step is asked for."""

    def __init__(self, *, applies: bool = True) -> None:
        self.applies = applies

    def was_step_applied(self) -> bool:
        return self.applies


class FakeBackend:
    """Stands for a ZeRO stage in which `replication_degree` ranks hold the same gradient of ones."""

    def __init__(self, parameters: list[nn.Parameter], replication_degree: int = 1) -> None:
        self.parameters, self.replication_degree = parameters, replication_degree
        self.divisors: list[float] = []

    def step(self, divisor: float) -> None:
        self.divisors.append(divisor)

    def group_gradients(self) -> list[tuple[int, list[Tensor]]]:
        pieces = [torch.ones_like(parameter) for parameter in self.parameters]
        return [(0, pieces[:1]), (1, pieces[1:]), (1, [])]

    def param_shard(self, parameter: Any) -> ParamShard:
        return ParamShard(parameter, 0, 0, parameter.numel(), tuple(parameter.shape))


def faked(
    *, clip_norm: float = math.inf, applies: bool = True, ranks: DistributedContext | None = None, replication: int = 1
) -> tuple[Engine, FakeBackend, torch.optim.AdamW]:
    """An engine over two groups of different peak rates, without DeepSpeed."""
    first, second = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(9))
    groups = [
        ParameterGroup("projector", ("a",), (first,), 1e-3, 0.0),
        ParameterGroup("language", ("b",), (second,), 2e-5, 0.0),
    ]
    adam = torch.optim.AdamW([{"params": list(group.parameters)} for group in groups], lr=0.0)
    backend: Any = FakeBackend([first, second], replication)
    engine = Engine(
        deepspeed_engine=FakeDeepSpeed(applies=applies),
        adam=adam,
        groups=groups,
        backend=backend,
        ranks=ranks or DistributedContext(),
        clip_norm=clip_norm,
    )
    return engine, backend, adam


@pytest.mark.parametrize("factor", [0.0, 1 / 3, 0.7, 1.0])
def test_each_group_steps_at_its_peak_rate_times_the_factor(factor: float) -> None:
    engine, _, adam = faked()
    engine.step(factor, norm=1.0)
    assert [group["lr"] for group in adam.param_groups] == [1e-3 * factor, 2e-5 * factor]
    assert engine.learning_rates(factor) == [1e-3 * factor, 2e-5 * factor]


@pytest.mark.parametrize(
    ("norm", "clip_norm", "scale", "divisor"),
    [(5.0, math.inf, 1.0, 1.0), (5.0, 2.0, 1.0, 2.5), (1.0, 2.0, 1.0, 1.0), (5.0, 2.0, 1024.0, 2560.0)],
)
def test_a_gradient_is_divided_by_loss_scale_and_clipping_at_once(
    norm: float, clip_norm: float, scale: float, divisor: float
) -> None:
    engine, backend, _ = faked(clip_norm=clip_norm)
    engine.step(1.0, norm, scale)
    assert backend.divisors == [divisor]


def test_a_step_that_deepspeed_refuses_is_an_error() -> None:
    engine, _, _ = faked(applies=False)
    with pytest.raises(RuntimeError, match="DeepSpeed refused a step"):
        engine.step(1.0, norm=1.0)


def test_norms_are_counted_once_however_many_ranks_hold_a_gradient() -> None:
    """A sum over the ranks of what each gives is the squared norm of each group."""
    assert faked()[0].squared_norms() == [4.0, 9.0]
    both = [faked(ranks=DistributedContext(rank, 2), replication=2)[0].squared_norms() for rank in (0, 1)]
    assert [sum(group) for group in zip(*both, strict=True)] == [4.0, 9.0]


def test_of_ranks_that_hold_the_same_the_first_gives_fragments() -> None:
    named = [
        [fragment.name for fragment in faked(ranks=DistributedContext(rank, 2), replication=2)[0].fragments()]
        for rank in (0, 1)
    ]
    assert named == [["a", "b"], []]
