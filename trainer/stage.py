"""From a recipe and a stage's name to everything that the loop needs.

    recipe --facts--> stream
           --weights, init or resume--> model --tuning plan--> groups --objective--> TrainStep --> engine
    RUN/recipe.json                          the recipe, resolved
    RUN/lock.json                            who writes here
    RUN/STAGE/checkpoints/, ledger/, ranks/, metrics.jsonl, events.jsonl, quarantine.jsonl, finished.json

Starting from another stage (`load_given`, weights only) and resuming (`resume`, everything) are two functions.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.build import open_stream
from data_pipeline.stream import RowStream, merge_states
from models.build import Facts, build_vlm, read_facts
from models.errors import InputError
from models.files import write_json
from models.spec import TextSpec
from models.vlm import VLM
from trainer.best import Best
from trainer.built import check_built
from trainer.checkpoint import WEIGHT, CheckpointReader, name_of
from trainer.config import StageConfig
from trainer.engine import Engine, start_distributed
from trainer.guard import Guard
from trainer.interrupt import Interrupt
from trainer.ledger import Ledger
from trainer.lock import RunLock
from trainer.objectives import build_objective
from trainer.ranks import Ranks
from trainer.recipe import Recipe
from trainer.resume import last_rollback_to, resume_point
from trainer.saving import Saver
from trainer.schedule import Consumed
from trainer.step import TrainStep
from trainer.streams import stream_seed
from trainer.tuning import ParameterGroup, apply_plan
from trainer.validation import Validator, open_measure
from trainer.watch import Watch
from trainer.weights import base_digests, finished_checkpoint, load_weights


@dataclass
class Stage:
    """One stage of a run, ready to go on from `consumed`."""

    recipe: Recipe
    name: str
    config: StageConfig
    directory: Path
    ranks: Ranks
    device: torch.device
    text: TextSpec
    groups: list[ParameterGroup]
    engine: Engine
    stream: RowStream
    given: dict[str, Tensor]
    record: dict[str, Any]
    """What every checkpoint of this stage says of itself besides the state of the run."""
    consumed: Consumed
    guard: Guard
    best: Best
    interrupt: Interrupt
    lock: RunLock | None
    """Held by the first rank."""
    watch: Watch
    saver: Saver
    ledger: Ledger
    validator: Validator | None
    checkpoint: Path | None = None
    """The last one that was committed."""
    longest_step_s: float = 0.0

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches a step, the same on every rank; a rank with fewer rows fills up with empty ones."""
        return micro_batches(self.config, self.ranks.world_size)

    def is_asked_to_stop(self) -> bool:
        """Whether this rank knows of a reason to stop; what the others know, only a sum over the ranks tells."""
        return self.interrupt.is_due(self.longest_step_s, self.saver.longest_s)

    def begin_save(self) -> None:
        """Start to write a checkpoint of the state after the last step; every rank must call it at the same step."""
        self.watch.mark("saving", self.consumed.steps)
        state = {
            **self.record,
            "consumed": asdict(self.consumed),
            "num_updates": self.engine.num_updates,
            "stream": merge_states(self.ranks.gather(self.stream.state_dict())),
            "guard": self.guard.state_dict(),
            "best": self.best.state_dict(),
        }
        self.saver.begin(self.consumed.steps, fragments=self.engine.fragments(), given=self.given, state=state)

    def finish_save(self) -> None:
        """Commit the checkpoint on its way. One that cannot be written is a loud line, not the end of the run."""
        written = self.saver.name
        fault = self.saver.finish(spare=[name_of(self.best.step)])
        if not fault:
            self.checkpoint = self.directory / "checkpoints" / written
        elif self.ranks.is_first:
            print(f"warning: {fault}; training goes on, older checkpoints are untouched", flush=True)

    def close(self) -> None:
        """End the data workers, let go of the engine, and give the run directory back."""
        self.stream.close()
        if self.validator is not None:
            self.validator.close()
        self.engine.close()
        self.ledger.close()
        self.watch.close()
        if self.lock is not None:
            self.lock.release()


def micro_batches(config: StageConfig, world_size: int) -> int:
    """How many micro-batches one rank computes for one step."""
    rows_per_rank = math.ceil(config.batch.global_rows / world_size)
    return math.ceil(rows_per_rank / config.batch.micro_rows)


def open_stage(recipe: Recipe, name: str, ranks: Ranks, interrupt: Interrupt | None = None) -> Stage:
    """Build a stage; it goes on from its newest sound checkpoint where there is one, else starts from its `init`.

    What a person can have got wrong is looked at first, before the ranks meet and before anything is written.
    """
    config, directory = recipe.stage(name), Path(recipe.run) / name
    check_built(recipe, name)
    given_from = _init_reader(recipe, config)
    facts = read_facts(recipe.model, config.data.max_length)
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
    consumed, guard, best = Consumed(), Guard(config.guard), Best()
    if reader is not None:
        consumed, best = load_progress(directory, reader, engine, stream, guard), Best(**reader.state["best"])
    ledger = Ledger(directory / "ledger", ranks, resumed_at=consumed.batches, facts={"engine": config.engine.zero})
    saver = Saver(
        directory / "checkpoints",
        ranks,
        keep=config.checkpoint.keep,
        token=ranks.gather(lock.holder.token if lock is not None else "")[0],
        before=ledger.sync,
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
        groups=groups,
        engine=engine,
        stream=stream,
        given=given,
        record=record,
        consumed=consumed,
        guard=guard,
        best=best,
        interrupt=interrupt or Interrupt({}),
        lock=lock,
        watch=watch,
        saver=saver,
        ledger=ledger,
        validator=validator,
        checkpoint=reader.directory if reader is not None else None,
    )


def load_progress(
    directory: Path, reader: CheckpointReader, engine: Engine, stream: RowStream, guard: Guard
) -> Consumed:
    """Moments, guard and data from a checkpoint, the data from where a rollback to it went on; what is consumed.

    The weights are loaded elsewhere: into the model before an engine is built, or into the engine.
    """
    engine.load_moments(reader.read, int(reader.state["num_updates"]))
    guard.load_state_dict(reader.state["guard"])
    state = reader.state
    rollback = last_rollback_to(directory, reader.directory.name, state["consumed"]["batches"])
    if rollback is not None:
        state = rollback
    stream.load_state_dict(state["stream"])
    return Consumed(**state["consumed"])


def take_lock(run: Path, ranks: Ranks) -> RunLock | None:
    """The first rank takes the run directory for all; InputError on every rank where another process has it."""
    lock, fault = None, ""
    if ranks.is_first:
        try:
            lock = RunLock(run)
        except InputError as error:
            fault = str(error)
    fault = ranks.gather(fault)[0]
    if fault:
        raise InputError(fault)
    if lock is not None and lock.replaced is not None:
        gone = lock.replaced
        print(f"{run}: took over from process {gone.pid} on {gone.host}, which has ended", flush=True)
    return lock


def _write_recipe(recipe: Recipe, directory: Path, ranks: Ranks) -> None:
    if ranks.is_first:
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory.parent / "recipe.json", json.loads(recipe.model_dump_json()))


def _build_engine(config: StageConfig, vlm: VLM, groups: list[ParameterGroup], ranks: Ranks) -> Engine:
    if config.engine.activation_checkpointing:
        vlm.language.gradient_checkpointing_enable({"use_reentrant": False})
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

    A projector that does not learn counts as given: it is in no pretrained base, so every checkpoint must hold it.
    """
    config = recipe.stage(name)
    frozen_dtype = torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
    vlm = build_vlm(recipe.model, facts, frozen_dtype=frozen_dtype, seed=stream_seed(recipe.seed, "projector"))
    groups = apply_plan(vlm, config.tune, seed=stream_seed(recipe.seed, name, "adapters"))
    loaded = load_weights(vlm, given_from) if given_from is not None else []
    learning = {parameter_name for group in groups for parameter_name in group.names}
    projector = [parameter for parameter, _ in vlm.named_parameters() if parameter.startswith("projector.")]
    parameters = dict(vlm.named_parameters())
    return vlm, groups, {key: parameters[key].data for key in {*loaded, *projector} - learning}


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
