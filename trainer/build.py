"""Builds a stage: from a recipe and a stage's name to a run that is ready to continue. Five phases, in this order:

    1 read_inputs    the user's inputs: files, choices, data; no process group, nothing written
    2 join_ranks     process group, device, the run's lock, the watchdog; which checkpoint to resume from
    3 build_model    pretrained and new parts, the tuning plan, weights of the previous stage or of the checkpoint
    4 build_engine   model and objective as one module under DeepSpeed
    5 restore        moments, counters and the data's position; ledger, checkpoints and validation

Starting from another stage (`init`, weights only) and resuming (everything) are two different things.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from models.build import new_prefixes
from models.common.documents import parse
from models.common.errors import InputError
from models.common.files import LineFile, read_lines, write_json
from models.placement import placing
from models.vlm import VLM
from trainer.checkpoint.format import Fragment
from trainer.checkpoint.initial_weights import finished_checkpoint, inherited_fragments, load_weights
from trainer.checkpoint.manager import CheckpointManager
from trainer.checkpoint.reader import CheckpointReader
from trainer.checkpoint.resume import resume_point
from trainer.checkpoint.verify import check_sound
from trainer.config.recipe import Recipe
from trainer.config.schema import Duration, is_loss
from trainer.distributed.context import DistributedContext
from trainer.distributed.device import as_record, check_precision, describe
from trainer.distributed.preemption import PreemptionHandler
from trainer.distributed.run_lock import RunLock, take_lock
from trainer.distributed.start import Start
from trainer.distributed.watchdog import Watchdog, limited_start
from trainer.engine.determinism import set_determinism
from trainer.engine.engine import Engine
from trainer.engine.engine import build_engine as wrap
from trainer.engine.loss_scale import LossScale
from trainer.engine.masters import Exact, filler, has_masters, narrow
from trainer.engine.partitions import placement_for
from trainer.engine.process_group import start_distributed
from trainer.engine.train_step import TrainingTask, configure_model
from trainer.engine.tuning import ParameterGroup
from trainer.flops.estimator import FlopsEstimator, flops_estimator
from trainer.flops.shapes import model_shape
from trainer.guard import Guard
from trainer.inputs import Inputs, agreed_record, check_start, is_finished, read_inputs
from trainer.ledger.ledger import Ledger
from trainer.starting_model import starting_model
from trainer.state import RunContext, Services, StageRun, TrainState, num_micro_batches
from trainer.validation.validator import Validator

logger = logging.getLogger(__name__)


def find_finished(recipe: Recipe, name: str, ranks: DistributedContext, start: Start | None = None) -> Path | None:
    """The checkpoint that a stage is finished with; None where there is something to train.

    Every rank must call it. The ranks meet where there is something to compare.

    Raises:
        InputError: on every rank, the stage was finished with other values than the recipe now has.
    """
    if finished_checkpoint(Path(recipe.run), name) is None:
        return None
    if ranks.world_size > 1:
        start_distributed(ranks, recipe.stage(name).guard.rank_timeout_s, start.meet() if start is not None else None)
    with limited_start(ranks, recipe.stage(name).guard.rank_timeout_s):
        return is_finished(recipe, name, ranks)


def build_stage(
    recipe: Recipe,
    name: str,
    ranks: DistributedContext,
    preemption: PreemptionHandler | None = None,
    start: Start | None = None,
) -> StageRun:
    """Build a stage; it resumes from its newest complete checkpoint if there is one, else starts from its `init`.

    Every rank must call it.

    Args:
        start: where the ranks have met, and who ends them where one of them fails; None: they meet here.

    Raises:
        InputError: on every rank, for wrong inputs, before anything is written.
    """
    inputs = read_inputs(recipe, name, ranks)
    with ExitStack() as undo:
        undo.callback(inputs.stream.close)
        joined = join_ranks(inputs, undo, start)
        model = build_model(inputs, joined)
        engine = build_engine(inputs, joined, model)
        run = restore(inputs, joined, model, engine, preemption or PreemptionHandler())
        undo.pop_all()
    return run


@dataclass(frozen=True)
class Joined:
    """Phase 2: this rank among the others, on its device, in a run directory that is theirs."""

    device: torch.device
    lock: RunLock | None
    watchdog: Watchdog
    record: Mapping[str, Any]
    reader: CheckpointReader | None
    """The checkpoint that this start resumes from."""


def join_ranks(inputs: Inputs, undo: ExitStack, start: Start | None = None) -> Joined:
    """Join the other ranks, lock the run's directory, and agree on the checkpoint to resume from.

    `undo` gets the clean-up for the case that a later phase fails.
    """
    ranks, timeout_s = inputs.ranks, inputs.config.guard.rank_timeout_s
    device = start_distributed(ranks, timeout_s, start.meet() if start is not None else None)
    chosen = inputs.config.engine
    set_determinism(chosen.deterministic)
    check_precision(chosen.precision, describe(ranks.rank, device).capability, f"stages.{inputs.name}.engine.precision")
    facts = as_record(device, chosen.precision, is_deterministic=chosen.deterministic)
    logger.info(", ".join(f"{name} {value}" for name, value in facts.items()))
    with limited_start(ranks, timeout_s):  # the watchdog writes into the directory, so it begins behind the lock
        lock = take_lock(Path(inputs.recipe.run), ranks)
    if lock is not None:
        undo.callback(lock.release)
        if start is not None:
            start.at_end(lock.release)
    watchdog = Watchdog(inputs.directory / "ranks", ranks, timeout_s).start()
    undo.callback(watchdog.close)
    if inputs.init is not None:
        check_sound(inputs.init.directory, ranks)
    record = agreed_record(inputs)
    check_start(inputs)
    return Joined(device, lock, watchdog, record, resume_point(inputs.directory, record, ranks))


@dataclass(frozen=True)
class Model:
    """Phase 3: the model with its tuning plan on it."""

    vlm: VLM
    groups: list[ParameterGroup]
    inherited: list[Fragment]
    """What this rank writes into checkpoints of weights that are not trained here and are in no pretrained base."""
    exact: dict[str, Exact]
    """Trained weights that bf16 parameters do not hold (`trainer.engine.masters`)."""


def build_model(inputs: Inputs, joined: Joined) -> Model:
    """Pretrained and new parts, the tuning plan, then weights: those of the previous stage, or the checkpoint's.

    A new part that is not trained counts as inherited: it is in no pretrained base. Pretrained weights are read to the
    device, or under ZeRO-3 to this rank's share of each, so that no rank holds the whole base.
    """
    recipe = inputs.recipe
    if inputs.ranks.is_first:
        inputs.directory.mkdir(parents=True, exist_ok=True)
        write_json(inputs.directory.parent / "recipe.json", parse(recipe.model_dump_json(), "the recipe"))
        (inputs.directory / "finished.json").unlink(missing_ok=True)  # it is trained for longer
    with placing(placement_for(inputs.config.engine, joined.device, inputs.ranks)):
        vlm, groups, loaded = starting_model(recipe, inputs.name, inputs.metadata, inputs.init)
        learning = {parameter_name for group in groups for parameter_name in group.names}
        parameters = dict(vlm.named_parameters())
        prefixes = new_prefixes(recipe.model)
        new = [parameter for parameter in parameters if parameter.startswith(prefixes)]
        if joined.reader is not None:
            load_weights(vlm, joined.reader)
        inherited = inherited_fragments(parameters, {*loaded, *new} - learning, inputs.ranks)
        exact = narrow(groups) if has_masters(inputs.config) else {}
    vlm.to(joined.device)
    keep = recipe.model.vision.keep_features
    if keep is not None:
        vlm.vision.keep_features(Path(keep.path), keep.limit_gb)
    return Model(vlm, groups, inherited, exact)


def build_engine(inputs: Inputs, joined: Joined, model: Model) -> Engine:
    """Model and objective as one module under DeepSpeed."""
    config, ranks = inputs.config, inputs.ranks
    configure_model(model.vlm, config.engine)
    engine = wrap(
        TrainingTask(model.vlm, config.objective.build(), config.engine.precision),
        model.groups,
        config=config.engine,
        optimizer=config.optimizer,
        micro_rows=config.batch.micro_rows,
        num_micro_batches=num_micro_batches(config, ranks.world_size),
        ranks=ranks,
    )
    engine.set_masters(filler(model.exact), model.exact)
    model.exact.clear()
    return engine


def restore(inputs: Inputs, joined: Joined, model: Model, engine: Engine, preemption: PreemptionHandler) -> StageRun:
    """Take moments, counters and the data's position from the checkpoint; open the services that write files."""
    config, directory, ranks, reader = inputs.config, inputs.directory, inputs.ranks, joined.reader
    state = TrainState(Guard(config.guard), LossScale(config.engine.precision), inputs.stream)
    if reader is not None:
        engine.load_moments(reader.fill, int(reader.part("num_updates")))
        state.load(reader, directory)
    if inputs.measure is not None:
        if reader is not None and state.best.measured_by(inputs.measure.basis) is not state.best:
            _judge_by_earlier_measure(state, directory, ranks)
        choose_measure(state, inputs.measure.basis)
    ledger = Ledger.open(
        directory / "ledger", ranks, resumed_at=state.consumed.batches, facts={"engine": config.engine.zero}
    )
    context = RunContext(
        recipe=inputs.recipe,
        stage=inputs.name,
        ranks=ranks,
        device=joined.device,
        metadata=inputs.metadata,
        record=joined.record,
        estimator=_estimator(inputs),
    )
    services = Services(
        engine=engine,
        checkpoints=_checkpoint_manager(inputs, joined, ledger),
        ledger=ledger,
        watchdog=joined.watchdog,
        preemption=preemption,
        events=LineFile(directory / "events.jsonl"),
        validator=_validator(inputs, joined, engine),
        inherited=model.inherited,
        lock=joined.lock,
    )
    run = StageRun(context, state, services, resumed_from=reader.directory if reader is not None else None)
    if reader is not None:
        _tell_longer(run, reader)
    return run


def _judge_by_earlier_measure(state: TrainState, directory: Path, ranks: DistributedContext) -> None:
    """Offer the best by the last start's measure what that start measured after its checkpoint was written."""
    step, metric = state.consumed.steps, state.best.measure.partition(" ")[0]
    if step in {0, state.best.last_step}:
        return
    lines = read_lines(directory / "validation.jsonl") if ranks.is_first else []
    found = ranks.gather(next((line[metric] for line in lines if line.get("step") == step and metric in line), None))[0]
    if found is not None:
        state.best.offer(float(found), step, lower_is_better=is_loss(metric))


def choose_measure(state: TrainState, measure: str) -> None:
    """The best so far is that of the present measure; says so where an earlier start had another one."""
    before, state.best = state.best, state.best.measured_by(measure)
    if before is not state.best and before.value is not None:
        found = "none yet" if state.best.value is None else f"{state.best.value:.4g} at step {state.best.step}"
        logger.info(
            f"validation is by {measure} now, best: {found}; the best by {before.measure}, {before.value:.4g} at step"
            f" {before.step}, is kept and not compared with it"
        )


def _tell_longer(run: StageRun, reader: CheckpointReader) -> None:
    """Say what a longer duration does to the learning rate, which is a function of the share that is used up."""
    config, title = run.context.config, run.context.title
    before = Duration(**reader.part("config")["duration"])
    if config.duration.count <= before.count:
        return
    rate = run.context.learning_rate(run.state.stream.epoch_samples)
    shares = [replace(rate, duration=planned).at(run.state.consumed) for planned in (before, config.duration)]
    logger.info(
        f"{title}: trained for longer, {before.count} -> {config.duration.count} {before.unit}; the schedule now spans "
        f"them all, so the learning rate goes on at {shares[1]:.3g} of its peak, where it was at {shares[0]:.3g}"
    )


def _estimator(inputs: Inputs) -> FlopsEstimator | None:
    try:
        return flops_estimator(inputs.config, model_shape(inputs.recipe.model))
    except InputError:  # a part whose cost is not known: throughput is logged without FLOPs
        return None


def _checkpoint_manager(inputs: Inputs, joined: Joined, ledger: Ledger) -> CheckpointManager:
    ranks, lock = inputs.ranks, joined.lock
    manager = CheckpointManager(
        inputs.directory / "checkpoints",
        ranks,
        keep=inputs.config.checkpoint.keep,
        token=ranks.gather(lock.holder.token if lock is not None else "")[0],
        before=(ledger.sync, inputs.stream.sync),
        check=lock.check if lock is not None else lambda: None,
        clock=joined.watchdog.running_s,
    )
    if joined.reader is not None:
        manager.trust(joined.reader.directory)
    return manager


def _validator(inputs: Inputs, joined: Joined, engine: Engine) -> Validator | None:
    if inputs.measure is None:
        return None
    return Validator(
        inputs.measure,
        module=engine.module,
        engine=engine,
        ranks=inputs.ranks,
        device=joined.device,
        directory=inputs.directory,
    )
