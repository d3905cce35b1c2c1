"""The inputs of a stage: the user's files, choices and data, checked before the ranks join, and the stage's record.

Needs no process group, and writes nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from data_pipeline.build import open_stream, order_fingerprint
from data_pipeline.source import open_index
from data_pipeline.stream import RowStream
from models.build import ModelMetadata, read_metadata
from models.common.errors import InputError
from trainer.checkpoint.format import COMMIT, WEIGHT, checkpoints_in, newest
from trainer.checkpoint.identity import check, compare, digests_of, record_of, start_of
from trainer.checkpoint.initial_weights import finished_checkpoint
from trainer.checkpoint.reader import CheckpointReader
from trainer.checkpoint.records import read_state
from trainer.config.recipe import Recipe
from trainer.config.schema import StageConfig
from trainer.config.tuning import Frozen
from trainer.distributed.context import DistributedContext
from trainer.distributed.seeding import derive_seed
from trainer.objectives.gather import check_rows_at_once
from trainer.validation.measure import Measure, open_measure

Result = TypeVar("Result")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inputs:
    """Phase 1: the recipe and the contents of the files that it names."""

    recipe: Recipe
    name: str
    ranks: DistributedContext
    metadata: ModelMetadata
    init: CheckpointReader | None
    """The finished checkpoint of the stage that this one starts from."""
    measure: Measure | None
    stream: RowStream

    @property
    def config(self) -> StageConfig:
        """The stage's part of the recipe."""
        return self.recipe.stage(self.name)

    @property
    def directory(self) -> Path:
        """RUN/STAGE."""
        return Path(self.recipe.run) / self.name


def read_inputs(recipe: Recipe, name: str, ranks: DistributedContext) -> Inputs:
    """Check all of the user's inputs. Raises InputError for a wrong one; nothing is written."""
    config = recipe.stage(name)
    check_run(recipe, name)
    _check_precision(recipe, config)
    ranks.check_rows(config.batch.global_rows, f"stages.{name}.batch.global_rows")
    check_rows_at_once(config, ranks.world_size, f"stages.{name}")
    check_kept_features(recipe, name)
    check_compile(config, f"stages.{name}.engine")
    init = _init_reader(recipe, config)
    metadata = read_metadata(recipe.model, config.data.max_length, config.objective.reader)
    doubt = recipe.model.vision.size_doubt()
    if doubt is not None and ranks.is_first:
        logger.warning(doubt)
    measure = open_measure(recipe, name, metadata)
    quarantine = Path(recipe.run) / name / "quarantine.jsonl"
    stream = open_rows(recipe, name, metadata, ranks, quarantine)
    return Inputs(recipe, name, ranks, metadata, init, measure, stream)


def open_rows(
    recipe: Recipe, name: str, metadata: ModelMetadata, ranks: DistributedContext, quarantine: Path | None
) -> RowStream:
    """A stage's rows for this rank from the start of the data; needs no process group and no model."""
    config = recipe.stage(name)
    return open_stream(
        config.data,
        tokenizer=metadata.tokenizer,
        image=metadata.image,
        text=metadata.text,
        seed=derive_seed(recipe.seed, name, "order"),
        num_slots=config.batch.global_rows,
        slots=ranks.local_rows(config.batch.global_rows),
        epochs=config.duration.count if config.duration.unit == "epochs" else None,
        quarantine=quarantine,
    )


def check_kept_features(recipe: Recipe, name: str) -> None:
    """Raise InputError where `model.vision.keep_features` cannot give a stage what the encoder would compute."""
    config = recipe.stage(name)
    if recipe.model.vision.keep_features is None:
        return
    reasons = {
        "tune.vision": "the encoder learns, so its features change" * (not isinstance(config.tune.vision, Frozen)),
        "data.augment": "a picture is drawn anew each time" * (config.data.augment is not None),
        "engine.zero": "under ZeRO-3 every rank must run the encoder equally often" * ("zero3" in config.engine.zero),
    }
    for key, reason in reasons.items():
        if reason:
            raise InputError(
                f"model.vision.keep_features: stages.{name}.{key}: {reason}; set model.vision.keep_features=null here"
            )


def check_compile(config: StageConfig, where: str) -> None:
    """Raise InputError for compiled layers under ZeRO-3, whose hooks fetch weights in the middle of each of them."""
    if config.engine.compile and "zero3" in config.engine.zero:
        raise InputError(
            f"{where}.compile: under {config.engine.zero} a layer's weights are fetched inside it, which breaks what is"
            " compiled into pieces that are slower than none (64 breaks in a step of two layers);"
            " set compile=false, or take zero2"
        )


def _check_precision(recipe: Recipe, config: StageConfig) -> None:
    """fp16's largest number is 65,504, which activations of models trained in bf16 exceed."""
    language = recipe.model.language
    if config.engine.precision != "fp16" or config.engine.force_fp16:
        return
    if language.published_dtype() == "bfloat16":
        raise InputError(
            f"engine.precision=fp16: {language.tokenizer_path} was trained in bf16, whose numbers fp16 cannot all hold;"
            " take bf16, or fp32 where the device has no bf16; engine.force_fp16=true takes the risk"
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
    return CheckpointReader.open(checkpoint, verify=False)  # all ranks do it together, once they have joined


def agreed_record(inputs: Inputs) -> dict[str, Any]:
    """What every checkpoint of a stage says of it, the same on every rank. A collective call.

    The digests are taken once, by the first rank; what goes wrong there is raised on every rank.
    """
    recipe, ranks = inputs.recipe, inputs.ranks
    digests = _agreed(ranks, lambda: digests_of(recipe))
    record = record_of(
        recipe,
        inputs.name,
        digests=digests,
        fingerprint=inputs.stream.order.identity.fingerprint,
        image=inputs.metadata.image,
        text=inputs.metadata.text,
        start=start_of(inputs.init.directory, inputs.init.state) if inputs.init is not None else None,
        world_size=ranks.world_size,
    )
    return {**record, "weight_kind": WEIGHT}


def check_start(inputs: Inputs) -> None:
    """Hold the stage that this one starts from against its present recipe. A collective call.

    Raises:
        InputError: its weights were trained with other values than the recipe now has.
    """
    init, name, run = inputs.init, inputs.config.init, Path(inputs.recipe.run)
    if init is None or name is None:
        return
    now = _agreed(inputs.ranks, lambda: _present_record(inputs.recipe, name))
    advice = (
        f"stages.{inputs.name}.init: {name} would not be what the recipe says; take the values of {run / 'recipe.json'}"
        f", train {name} for as long as the recipe says (--stage {name}), or start anew with run=ANOTHER_DIRECTORY"
    )
    check(compare(init.state, now), init.directory, run / "recipe.json", may_grow=False, advice=advice)


def is_finished(recipe: Recipe, name: str, ranks: DistributedContext) -> Path | None:
    """The checkpoint that a finished stage ended with; None where there is something left to train. A collective call.

    A longer duration than the stage was finished with is something left.

    Raises:
        InputError: the stage was finished with other values than the recipe now has.
    """
    done = finished_checkpoint(Path(recipe.run), name)
    if done is None:
        return None
    return _agreed(ranks, lambda: None if _is_longer(recipe, name, done) else done)


def _is_longer(recipe: Recipe, name: str, done: Path) -> bool:
    """Whether a finished stage is to be trained for longer. Raises InputError where it is another stage now."""
    if not (done / "state.json").is_file():
        raise InputError(f"{done}: not there, and {done.parents[1] / 'finished.json'} names it; put it back")
    table = compare(read_state(done), _present_record(recipe, name))
    check(table, done, Path(recipe.run) / "recipe.json")
    return any(field.is_longer for field in table)


def check_replayed(recipe: Recipe, name: str) -> None:
    """Hold a stage that is to be computed again from its start against its newest sound checkpoint.

    Raises:
        InputError: it was trained with other values, files or data than are there now.
    """
    run = Path(recipe.run)
    found, _ = newest(run / name / "checkpoints")
    if found is not None:
        check(compare(read_state(found), _present_record(recipe, name)), found, run / "recipe.json")


def _present_record(recipe: Recipe, name: str) -> dict[str, Any]:
    """What identifies a stage that is not about to be trained; what is not on this machine is left out."""
    config = recipe.stage(name)
    facts: dict[str, Any] = {}
    with suppress(InputError):  # without the parts, their paths are compared
        facts["digests"] = digests_of(recipe)
        metadata = read_metadata(recipe.model, config.data.max_length, config.objective.reader)
        facts |= {"image": metadata.image, "text": metadata.text}
    with suppress(InputError, OSError):  # without the data, likewise
        facts["fingerprint"] = order_fingerprint(config.data, [open_index(each) for each in config.data.sources])
    earlier = finished_checkpoint(Path(recipe.run), config.init) if config.init is not None else None
    if earlier is not None and (earlier / "state.json").is_file():
        facts["start"] = start_of(earlier, read_state(earlier))
    return record_of(recipe, name, **facts)


def check_run(recipe: Recipe, name: str) -> None:
    """Hold the other stages that the run directory holds against the recipe, which `recipe.json` is about to say.

    Values of the recipe alone: where files lie, and what they hold, is looked at where a stage uses them.

    Raises:
        InputError: the run is another recipe's.
    """
    run = Path(recipe.run)
    for directory in sorted(path.parent for path in run.glob("*/checkpoints") if path.parent.name != name):
        committed = [path for path in checkpoints_in(directory / "checkpoints") if (path / COMMIT).is_file()]
        if not committed:
            continue
        last, file = committed[-1], run / "recipe.json"
        if directory.name not in recipe.stages:
            raise InputError(
                f"{last}: {recipe.name} has no stage {directory.name}, so {file} would not say how it was trained; "
                "keep the stage in the recipe, or start anew with run=ANOTHER_DIRECTORY"
            )
        try:
            state = read_state(last)
        except InputError:
            continue  # damaged: who uses it says so
        table = [each for each in compare(state, record_of(recipe, directory.name)) if not each.is_place]
        check(table, last, file)


def _agreed(ranks: DistributedContext, work: Callable[[], Result]) -> Result:
    """What the first rank found, on every rank, where its InputError is raised too. A collective call."""
    found: tuple[Any, str] = (None, "")
    if ranks.is_first:
        try:
            found = (work(), "")
        except InputError as error:
            found = (None, str(error))
    result, fault = ranks.gather(found)[0]
    if fault:
        raise InputError(fault)
    return cast(Result, result)
