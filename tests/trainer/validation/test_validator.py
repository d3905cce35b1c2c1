"""Validation measures the same however it is split, changes nothing of the training, and gives way at once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipeline.batch import Batch, collate
from data_pipeline.index_build import build_index
from models.build import build_vlm, read_metadata
from models.common.errors import InputError
from tests.support.backbones import tiny_recipe
from tests.support.benchmarks import PROMPT, make_benchmark
from tests.support.ranks import run_on_ranks
from tests.support.shards import chat_sample, write_tar
from trainer.config.recipe import Recipe
from trainer.distributed.context import DistributedContext
from trainer.engine.train_step import TrainingTask
from trainer.engine.tuning import apply_plan
from trainer.objectives.loss_sum import LossSum
from trainer.validation.measure import open_measure
from trainer.validation.validator import Validator

NUM_SAMPLES, NUM_BROKEN = 9, 1


class PlainEngine:
    """Evaluates as DeepSpeed's engine does, the careless return to training mode included."""

    def __init__(self, module: TrainingTask) -> None:
        self.module = module

    def evaluate(self, batch: Batch) -> LossSum:
        self.module.eval()
        with torch.no_grad():
            sums: LossSum = self.module(batch)
        self.module.train()
        return sums

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        with nullcontext():
            yield


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("validation")
    (folder / "shards").mkdir()
    samples = [(f"{number:06d}", chat_sample(number)) for number in range(NUM_SAMPLES)]
    samples.append(("broken", {**chat_sample(0), "png": b"no image"}))
    write_tar(folder / "shards" / "shard-000000.tar", samples)
    build_index(folder / "shards")
    tiny = make_benchmark(folder)
    found = tiny_recipe(folder, folder / "shards")
    lora = found["stages"]["lora"]
    lora["init"] = None
    lora["tune"]["language"]["dropout"] = 0.2
    captions = {"captions": str(tiny.captions), "images": str(tiny.images), "prompt": PROMPT}
    lora["validation"] = {
        "data": lora["data"],
        "every_steps": 2,
        "generate": 3,
        "max_new_tokens": 6,
        "metric": "validation/caption/cider",
        "tasks": [
            {"kind": "caption", "meteor": False, "max_new_tokens": 4, **captions},
            {"kind": "image_gain", "data": {"kind": "captions", **captions}},
        ],
    }
    return found


def parse(recipe: dict[str, Any], *, micro_rows: int = 2, precision: str = "bf16", lora: bool = True) -> Recipe:
    varied = json.loads(json.dumps(recipe))
    if not lora:  # a process that needs no peft starts in half the time
        del varied["stages"]["lora"]["tune"]["language"]
    varied["stages"]["lora"]["batch"]["micro_rows"] = micro_rows
    varied["stages"]["lora"]["engine"]["precision"] = precision
    return Recipe.model_validate_json(json.dumps(varied))


def open_validator(recipe: Recipe, ranks: DistributedContext, directory: Path) -> tuple[Validator, TrainingTask]:
    stage = recipe.stage("lora")
    facts = read_metadata(recipe.model, stage.data.max_length)
    measure = open_measure(recipe, "lora", facts)
    assert measure is not None
    precision = stage.engine.precision
    frozen_dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    vlm = build_vlm(recipe.model, facts, frozen_dtype=frozen_dtype, seed=1)
    apply_plan(vlm, stage.tune, seed=2)
    module = TrainingTask(vlm, stage.objective.build(), precision)
    validator = Validator(
        measure,
        module=module,
        engine=PlainEngine(module),
        ranks=ranks,
        device=torch.device("cpu"),
        directory=directory,
    )
    return validator, module


def measured(ranks: DistributedContext, recipe: dict[str, Any], folder: Path, micro_rows: int) -> dict[str, Any]:
    """What one rank of several finds, and what becomes of it when only the last rank is asked to stop."""
    if ranks.world_size > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    validator, _ = open_validator(parse(recipe, micro_rows=micro_rows, precision="fp32", lora=False), ranks, folder)
    metrics = validator.run(4, lambda: False)
    answers = [answered.answer for answered in validator.answers]
    stopped = []
    for patience in (0, 2, 9):  # before the loss, during it, within an answer
        polls = iter(range(1000))
        stopped.append(validator.run(5, lambda: ranks.rank == ranks.world_size - 1 and next(polls) >= patience))  # noqa: B023
    validator.close()
    return {"metrics": metrics, "answers": answers, "stopped": stopped}


@pytest.mark.slow
def test_ranks_and_micro_batches_change_nothing_and_any_rank_can_stop_it(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")  # no Java: the plain words are quicker to make
    one = measured(DistributedContext(), recipe, tmp_path / "one", 4)
    first, second = run_on_ranks(2, measured, recipe, tmp_path / "two", 1)
    assert first == second
    assert one["stopped"] == first["stopped"] == [None] * 3
    assert one["answers"] == first["answers"]
    assert len(set(one["answers"])) > 1
    metrics = one["metrics"]
    assert metrics["validation/samples"] == NUM_SAMPLES
    assert metrics["validation/unusable_samples"] == NUM_BROKEN
    assert set(metrics) >= {"validation/loss", "validation/caption/cider", "validation/image_gain/image_gain"}
    del metrics["validation/seconds"], first["metrics"]["validation/seconds"]
    assert first["metrics"] == pytest.approx(metrics, rel=1e-5, abs=1e-5)  # fp32 sums in another order
    page = (tmp_path / "two" / "validation" / "step_000004.html").read_text()
    assert page.count("<figure>") == page.count("data:image/jpeg") == 3
    unusable = (tmp_path / "one" / "validation" / "unusable.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in unusable] == ["broken"]


def train(recipe: Recipe, directory: Path, *, validate: bool) -> tuple[list[float], dict[str, Tensor]]:
    """Three steps with dropout from torch's own generator, which nothing seeds again in between."""
    torch.manual_seed(7)
    validator, module = open_validator(recipe, DistributedContext(), directory)
    module.train()
    module.vlm.vision.eval()
    modes = [each.training for each in module.modules()]
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-2)
    held_out = validator._measure.held_out
    rows = [(sample,) for sample in held_out.encoded(range(4)) if hasattr(sample, "input_ids")]
    batch = collate(rows, validator._measure.text)
    losses = []
    for step in range(3):
        loss = module(batch).loss_sum
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if validate:
            assert validator.run(step, lambda: False) is not None
            assert [each.training for each in module.modules()] == modes
    return losses, {name: value.detach().clone() for name, value in module.named_parameters() if value.requires_grad}


@pytest.mark.slow
def test_a_validated_run_is_bit_for_bit_an_unvalidated_one(recipe: dict[str, Any], tmp_path: Path) -> None:
    plain_losses, plain = train(parse(recipe), tmp_path, validate=False)
    losses, weights = train(parse(recipe), tmp_path, validate=True)
    assert losses == plain_losses
    assert all(torch.equal(weights[name], plain[name]) for name in plain)


def test_what_cannot_be_measured_is_said_before_a_model_is_built(recipe: dict[str, Any]) -> None:
    parsed = parse(recipe)
    facts = read_metadata(parsed.model, 256)
    config = parsed.stage("lora").validation
    assert config is not None

    def validated_by(**changes: Any) -> Recipe:
        stage = parsed.stage("lora").model_copy(update={"validation": config.model_copy(update=changes)})
        return parsed.model_copy(update={"stages": {**parsed.stages, "lora": stage}})

    with pytest.raises(
        InputError, match=r"validation/vqa/accuracy is not measured; there are validation/loss, .*cider"
    ):
        open_measure(validated_by(metric="validation/vqa/accuracy"), "lora", facts)
    with pytest.raises(InputError, match="two tasks have one name"):
        open_measure(validated_by(tasks=config.tasks[:1] * 2), "lora", facts)
    assert not config.lower_is_better
    assert config.model_copy(update={"metric": "validation/loss"}).lower_is_better
