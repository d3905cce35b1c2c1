"""Opens a stage: from a recipe and a stage's name to everything that the loop needs.

    recipe --facts--> stream
           --weights, init or resume--> model --tuning plan--> groups --objective--> TrainStep --> engine

What a person can have got wrong is looked at first, before the ranks meet and before anything is written. Starting from
another stage (`init`, weights only) and resuming (everything) are two functions.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from data_pipeline.build import open_stream
from data_pipeline.stream import RowStream
from models.build import Facts, build_vlm, new_prefixes, read_facts
from models.config import PretrainedLanguage
from models.errors import InputError
from models.files import LineFile, write_json
from models.source import directory_of, read_json
from models.vlm import VLM
from trainer.best import Best
from trainer.checkpoint import WEIGHT, CheckpointReader
from trainer.config import StageConfig
from trainer.engine import Engine, start_distributed
from trainer.guard import Guard
from trainer.image_text import check_pool
from trainer.insight import Insight
from trainer.interrupt import Interrupt
from trainer.ledger import Ledger
from trainer.lock import take_lock
from trainer.loss_scale import LossScale
from trainer.needs import Needs, stage_needs
from trainer.objectives import build_objective
from trainer.ranks import Ranks
from trainer.recipe import Recipe
from trainer.resume import load_progress, resume_point
from trainer.saving import Saver
from trainer.schedule import Consumed
from trainer.shapes import read_shape
from trainer.stage import Stage, micro_batches
from trainer.step import DTYPES, TrainStep, set_up
from trainer.streams import stream_seed
from trainer.tuning import ParameterGroup, apply_plan
from trainer.validation import Validator, open_measure
from trainer.watch import Watch
from trainer.weights import base_digests, finished_checkpoint, load_weights


def open_stage(recipe: Recipe, name: str, ranks: Ranks, interrupt: Interrupt | None = None) -> Stage:
    """Build a stage; it goes on from its newest sound checkpoint where there is one, else starts from its `init`.

    What a person can have got wrong is looked at first, before the ranks meet and before anything is written.
    """
    config, directory = recipe.stage(name), Path(recipe.run) / name
    _check_precision(recipe, config)
    check_pool(config, ranks.world_size, f"stages.{name}")
    given_from = _init_reader(recipe, config)
    facts = read_facts(recipe.model, config.data.max_length, config.objective.reader)
    measure = open_measure(recipe, name, facts)
    stream = open_rows(recipe, name, facts, ranks, directory / "quarantine.jsonl")
    device = start_distributed(ranks, 1.5 * config.guard.rank_timeout_s)
    lock = take_lock(Path(recipe.run), ranks)
    watch = Watch(directory / "ranks", ranks, config.guard.rank_timeout_s)
    record = _record(recipe, name, facts, ranks)
    reader = resume_point(directory, record, ranks)
    _write_recipe(recipe, directory, ranks)
    vlm, groups, given = _prepare_model(recipe, name, facts, given_from)
    if reader is not None:
        load_weights(vlm, reader)
    engine = _build_engine(config, vlm.to(device), groups, ranks)
    consumed, guard, scale, best = Consumed(), Guard(config.guard), LossScale(config.engine.precision), Best()
    if reader is not None:
        consumed = load_progress(directory, reader, engine=engine, stream=stream, guard=guard, loss_scale=scale)
        best = Best(**reader.state["best"])
    ledger = Ledger(directory / "ledger", ranks, resumed_at=consumed.batches, facts={"engine": config.engine.zero})
    saver = Saver(
        directory / "checkpoints",
        ranks,
        keep=config.checkpoint.keep,
        token=ranks.gather(lock.holder.token if lock is not None else "")[0],
        before=(ledger.sync, stream.sync),
        check=lock.check if lock is not None else lambda: None,
    )
    validator = None
    if measure is not None:
        validator = Validator(
            measure, module=engine.module, engine=engine, ranks=ranks, device=device, directory=directory
        )
    return Stage(
        recipe=recipe,
        name=name,
        config=config,
        directory=directory,
        ranks=ranks,
        device=device,
        text=facts.text,
        tokenizer=facts.tokenizer,
        needs=_needs(recipe, config),
        groups=groups,
        engine=engine,
        stream=stream,
        given=given,
        record=record,
        consumed=consumed,
        guard=guard,
        loss_scale=scale,
        best=best,
        interrupt=interrupt or Interrupt({}),
        lock=lock,
        watch=watch,
        saver=saver,
        ledger=ledger,
        events=LineFile(directory / "events.jsonl"),
        insight=Insight(recipe.tracking.histograms_every_steps, recipe.tracking.token_table_every_steps),
        validator=validator,
        checkpoint=reader.directory if reader is not None else None,
    )


def _check_precision(recipe: Recipe, config: StageConfig) -> None:
    """fp16 ends at 65,504: activations of models born in bf16 go beyond it."""
    language = recipe.model.language
    if config.engine.precision != "fp16" or config.engine.force_fp16 or not isinstance(language, PretrainedLanguage):
        return
    facts = read_json(directory_of(language.path), "config.json")
    if "bfloat16" in (facts.get("dtype"), facts.get("torch_dtype")):
        raise InputError(
            f"engine.precision=fp16: {language.path} was trained in bf16, whose numbers fp16 cannot all hold; take "
            "bf16, or fp32 where the device has no bf16; engine.force_fp16=true takes the risk"
        )


def _needs(recipe: Recipe, config: StageConfig) -> Needs | None:
    try:
        return stage_needs(config, read_shape(recipe.model))
    except InputError:  # a part whose cost is not known: throughput is told without it
        return None


def _write_recipe(recipe: Recipe, directory: Path, ranks: Ranks) -> None:
    if ranks.is_first:
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory.parent / "recipe.json", json.loads(recipe.model_dump_json()))


def _build_engine(config: StageConfig, vlm: VLM, groups: list[ParameterGroup], ranks: Ranks) -> Engine:
    set_up(vlm, config.engine)
    return Engine(
        TrainStep(vlm, build_objective(config.objective), config.engine.precision),
        groups,
        config=config.engine,
        optimizer=config.optimizer,
        micro_rows=config.batch.micro_rows,
        num_micro_batches=micro_batches(config, ranks.world_size),
        ranks=ranks,
    )


def open_rows(recipe: Recipe, name: str, facts: Facts, ranks: Ranks, quarantine: Path | None) -> RowStream:
    """A stage's rows for this rank from their beginning; without a process group and without a model."""
    config = recipe.stage(name)
    return open_stream(
        config.data,
        tokenizer=facts.tokenizer,
        image=facts.image,
        text=facts.text,
        seed=stream_seed(recipe.seed, name, "order"),
        num_slots=config.batch.global_rows,
        slots=ranks.share(config.batch.global_rows),
        epochs=config.duration.count if config.duration.unit == "epochs" else None,
        quarantine=quarantine,
    )


def _init_reader(recipe: Recipe, config: StageConfig) -> CheckpointReader | None:
    """The finished checkpoint of the stage that this one starts from."""
    if config.init is None:
        return None
    checkpoint = finished_checkpoint(Path(recipe.run), config.init)
    if checkpoint is None:
        raise InputError(
            f"{Path(recipe.run) / config.init}: no finished checkpoint to start from; run --stage {config.init} first"
        )
    return CheckpointReader(checkpoint)


def _prepare_model(
    recipe: Recipe, name: str, facts: Facts, given_from: CheckpointReader | None
) -> tuple[VLM, list[ParameterGroup], dict[str, Tensor]]:
    """The model with its tuning plan on it, and the weights it was given that do not learn here.

    A new part that does not learn counts as given: it is in no pretrained base, so every checkpoint must hold it.
    """
    config = recipe.stage(name)
    dtype = DTYPES[config.engine.precision]
    vlm = build_vlm(recipe.model, facts, frozen_dtype=dtype, seed=stream_seed(recipe.seed, "projector"))
    groups = apply_plan(vlm, config.tune, seed=stream_seed(recipe.seed, name, "adapters"))
    loaded = load_weights(vlm, given_from) if given_from is not None else []
    learning = {parameter_name for group in groups for parameter_name in group.names}
    parameters = dict(vlm.named_parameters())
    new = [parameter for parameter in parameters if parameter.startswith(new_prefixes(recipe.model))]
    return vlm, groups, {key: parameters[key].data for key in {*loaded, *new} - learning}


def _record(recipe: Recipe, name: str, facts: Facts, ranks: Ranks) -> dict[str, Any]:
    """What a checkpoint says of the stage; the base's digests are taken once, by the first rank."""
    base = base_digests(recipe) if ranks.is_first else {}
    return {
        "stage": name,
        "seed": recipe.seed,
        "model": recipe.model.model_dump(mode="json"),
        "config": recipe.stage(name).model_dump(mode="json"),
        "base": ranks.gather(base)[0],
        "world_size": ranks.world_size,
        "image": facts.image.model_dump(mode="json"),
        "weight_kind": WEIGHT,
    }
