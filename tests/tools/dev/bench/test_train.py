"""The compared ways of `make bench-train` train the same model on the same samples, and the command makes its table."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from tests.support.ranks import run_on_ranks
from tools.dev.bench import train
from tools.dev.bench.ordinary import PRECISIONS, OrdinaryLoop, OrdinaryModel, TrainerLoop
from tools.dev.bench.train import CELLS, FEATURE_LAYER, Cell, OurStep, Parts, make_samples
from trainer.config.tuning import Lora
from trainer.distributed.context import DistributedContext

CPU = torch.device("cpu")
PARTS = Parts(None, None, is_tiny=True)
SAMPLES = make_samples(4, 56, 4, 128)


def ordinary(cell: Cell) -> OrdinaryModel:
    vision, projector, language = PARTS.make(PRECISIONS[cell.precision])
    lora = cell.plan.language if isinstance(cell.plan.language, Lora) else None
    if lora is not None:  # two ways draw two masks
        lora = lora.model_copy(update={"dropout": 0.0})
    return OrdinaryModel(vision, projector, language, feature_layer=FEATURE_LAYER, image_token=127, lora=lora)


def three_steps(ranks: DistributedContext, folder: Path) -> list[tuple[float, float, float]]:
    """Losses of ours, of ours with features kept in `folder`, and of the peer."""
    cell = Cell("align", "fp32")
    ours, peer = OurStep(cell, PARTS, len(SAMPLES), CPU, None), OrdinaryLoop(ordinary(cell), "fp32", CPU)
    kept = OurStep(cell, PARTS, len(SAMPLES), CPU, folder)
    for group in peer._optimizer.param_groups:
        group["weight_decay"] = 0.0
    return [(ours.step(SAMPLES), kept.step(SAMPLES), peer.step(SAMPLES)) for _ in range(3)]


def trainers_seconds(ranks: DistributedContext, precision: str) -> float:
    return TrainerLoop(ordinary(Cell("lora", precision)), precision, CPU).seconds(SAMPLES, 2)


def table(ranks: DistributedContext, folder: Path) -> int:
    os.chdir(folder)
    return train.main(["--tiny", "--rows", "2", "--rounds", "1", "--device", "cpu"])


@pytest.mark.slow
def test_both_ways_have_the_same_losses_step_by_step(tmp_path: Path) -> None:
    """Their updates too, but for rounding: the same rate, clipping and AdamW, at which the second loss follows."""
    (losses,) = run_on_ranks(1, three_steps, tmp_path)
    for ours, kept, peers in losses:
        assert ours == kept
        assert ours == pytest.approx(peers, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_trainer_of_transformers_takes_the_same_module(precision: str) -> None:
    assert run_on_ranks(1, trainers_seconds, precision)[0] > 0


@pytest.mark.slow
def test_the_command_makes_its_table(tmp_path: Path) -> None:
    assert run_on_ranks(1, table, tmp_path) == [0]
    rows = json.loads((tmp_path / "runs/bench/train.json").read_text())
    assert [row["what"] for row in rows] == [cell.title for cell in CELLS]
    assert all(row["ours"] > 0 and row["peer"] > 0 for row in rows)
