"""`engine.deterministic`: what torch, cuBLAS and the attention kernels are told, and that a stage can be trained so."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from models import attention
from models.attention import Segments
from tests.support.backbones import tiny_recipe
from tests.support.ranks import run_on_ranks
from tests.support.shards import write_set
from tests.support.training import losses, same_weights, train_all, vary
from trainer.engine.determinism import WORKSPACE, set_determinism, set_workspace


@pytest.fixture(autouse=True)
def fast_afterwards(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(WORKSPACE, "")
    yield
    set_determinism(False)


def test_torch_is_strict_and_fills_nothing() -> None:
    """Only a warning would leave flash attention's backward as it is; NaN in ZeRO's padding would make norms NaN."""
    set_determinism(True)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory
    with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
        torch.zeros(4).put_(torch.tensor([1, 1]), torch.ones(2))
    set_determinism(False)
    torch.zeros(4).put_(torch.tensor([1, 1]), torch.ones(2))


@pytest.mark.parametrize(("before", "after"), [("", ":4096:8"), (":16:8", ":16:8"), (":4096:2:16:8", ":4096:8")])
def test_cublas_gets_workspaces_with_which_it_is_deterministic(before: str, after: str) -> None:
    environment = {WORKSPACE: before}
    set_workspace(environment)
    assert environment == {WORKSPACE: after}


@pytest.mark.parametrize("is_wanted", [True, False])
def test_flash_attention_is_told(is_wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def varlen(q: Tensor, *_: Any, **options: Any) -> Tensor:
        given.update(options)
        return q

    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=varlen))
    attention._flash_kernel.cache_clear()
    name, kernel = attention._flash_kernel(is_causal=True)
    attention._flash_kernel.cache_clear()
    set_determinism(is_wanted)
    states = torch.ones(4, 2, 8)
    assert name == "flash-attn"
    assert kernel is not None
    kernel(states, states, states, Segments(torch.tensor([0, 4]), (4,), 256, kernel), 1.0)
    assert given["deterministic"] is is_wanted


@pytest.mark.slow
def test_a_stage_trains_so_and_on_a_cpu_to_the_same_bits(tmp_path: Path) -> None:
    """Every operation of a step, a validation and a checkpoint has a deterministic kernel."""
    write_set(tmp_path / "shards", [5, 1, 9])
    recipe = tiny_recipe(tmp_path, tmp_path / "shards")
    recipe["stages"]["lora"]["init"] = None
    plain, strict = (
        vary(recipe, f"strict_{wanted}", "lora", engine__deterministic=wanted, engine__zero="zero3")
        for wanted in (False, True)
    )
    run_on_ranks(2, train_all, [(plain, "lora", {}), (strict, "lora", {})])
    assert losses(strict, "lora") == losses(plain, "lora")
    same_weights(strict, plain, "lora", rtol=0, atol=0)
