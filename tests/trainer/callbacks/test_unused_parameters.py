"""Tensors that get no gradient are named, on every rank and only where that is a fault."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.common.errors import InputError
from tests.support.fakes import FakeEngine, make_run, row
from trainer.callbacks.unused_parameters import FIRST_STEP, LATER_STEP, check_unused_parameters
from trainer.distributed.context import DistributedContext
from trainer.loop import fit

NAMES = ["vision.a", "projector.b", "language.q.lora_A.default.weight", "language.q.lora_B.default.weight"]


def gradients(*zero: int) -> list[tuple[str, Tensor]]:
    return [(name, torch.zeros(2) if place in zero else torch.ones(2)) for place, name in enumerate(NAMES)]


def check(*zero: int, num_steps: int = LATER_STEP, has_images: bool = True) -> None:
    check_unused_parameters(NAMES, gradients(*zero), DistributedContext(), num_steps=num_steps, has_images=has_images)


def test_a_silent_tensor_is_named_with_what_to_do() -> None:
    check()
    with pytest.raises(InputError, match=r"step 3: projector\.b got no gradient and would never learn; freeze"):
        check(1)


def test_an_adapters_a_is_silent_before_the_first_step_alone() -> None:
    check(2, num_steps=FIRST_STEP)
    with pytest.raises(InputError, match="lora_A"):
        check(2)
    with pytest.raises(InputError, match="lora_B"):
        check(3, num_steps=FIRST_STEP)


def test_a_batch_without_images_lets_vision_and_projector_off() -> None:
    check(0, 1, has_images=False)
    with pytest.raises(InputError, match=r"language\.q\.lora_B"):
        check(0, 1, 3, has_images=False)


def test_a_slice_of_no_element_counts_as_silent_where_no_rank_has_one() -> None:
    pieces = [(name, torch.zeros(0)) for name in NAMES]
    with pytest.raises(InputError, match=r"vision\.a, projector\.b"):
        check_unused_parameters(NAMES, pieces, DistributedContext(), num_steps=LATER_STEP, has_images=True)


def test_of_an_embeddings_adapter_the_other_half_is_silent_before_the_first_step() -> None:
    """peft starts A at 0 there, so that B has no gradient."""
    names = [f"language.embed.lora_embedding_{half}.default" for half in "AB"]

    def look(silent: int, num_steps: int) -> None:
        pieces = [(name, torch.full((2,), float(place != silent))) for place, name in enumerate(names)]
        check_unused_parameters(names, pieces, DistributedContext(), num_steps=num_steps, has_images=True)

    look(1, FIRST_STEP)
    for silent, num_steps in ((0, FIRST_STEP), (1, LATER_STEP)):
        with pytest.raises(InputError, match="got no gradient"):
            look(silent, num_steps)


class Blind(FakeEngine):
    """No gradient reaches its projector, which a batch without images lets off."""

    def __init__(self) -> None:
        super().__init__()
        self.groups[0].names = ("projector.weight",)

    def squared_norms(self) -> list[float]:
        return [0.0]


def test_a_part_that_no_sample_reaches_is_said_at_first_and_an_error_at_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run(tmp_path, [[row(number)] for number in range(6)], Blind())
    with pytest.raises(InputError, match=r"fake/align: projector had no gradient in 6 steps and learnt nothing"):
        fit(run)
    assert not (run.context.directory / "finished.json").exists()
    assert "step 1: no sample of the batch has an image, so projector learn nothing from it" in caplog.text
