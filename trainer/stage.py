"""From a recipe and a stage's name to everything that the loop needs.

    recipe --facts--> stream
           --weights, init or resume--> model --tuning plan--> groups --objective--> TrainStep --> engine
    RUN/recipe.json                          the recipe, resolved
    RUN/STAGE/checkpoints/, metrics.jsonl, quarantine.jsonl, finished.json

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
from trainer.built import check_built
from trainer.checkpoint import WEIGHT, CheckpointReader, newest, write_checkpoint
from trainer.config import StageConfig
from trainer.engine import Engine, start_distributed
from trainer.objectives import build_objective
from trainer.ranks import Ranks
from trainer.recipe import Recipe
from trainer.schedule import Consumed
from trainer.step import TrainStep
from trainer.streams import stream_seed
from trainer.tuning import ParameterGroup, apply_plan
from trainer.weights import base_digests, finished_checkpoint, load_weights

FREE_ON_RESUME = {"engine": None, "checkpoint": None, "validation": None, "data": "num_workers", "batch": "micro_rows"}
"""What may change between a start and its resumption, whole fields or one key of a field: it says how, not what."""


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

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches a step, the same on every rank; a rank with fewer rows fills up with empty ones."""
        return micro_batches(self.config, self.ranks.world_size)

    def save(self) -> Path:
        """Write a checkpoint of the state after the last step."""
        state = {
            **self.record,
            "consumed": asdict(self.consumed),
            "num_updates": self.engine.num_updates,
            "stream": merge_states(self.ranks.gather(self.stream.state_dict())),
        }
        return write_checkpoint(
            self.directory / "checkpoints",
            self.consumed.steps,
            fragments=self.engine.fragments(),
            given=self.given,
            state=state,
            ranks=self.ranks,
        )

    def close(self) -> None:
        """End the data workers and leave the process group."""
        self.stream.close()
        self.engine.close()


def micro_batches(config: StageConfig, world_size: int) -> int:
    """How many micro-batches one rank computes for one step."""
    rows_per_rank = math.ceil(config.batch.global_rows / world_size)
    return math.ceil(rows_per_rank / config.batch.micro_rows)


def open_stage(recipe: Recipe, name: str, ranks: Ranks) -> Stage:
    """Build a stage; it goes on from its newest sound checkpoint where there is one, else starts from its `init`.

    What a person can have got wrong is looked at first, before the ranks meet and before anything is written.
    """
    config, directory = recipe.stage(name), Path(recipe.run) / name
    check_built(recipe, name)
    given_from = _init_reader(recipe, config)
    facts = read_facts(recipe.model, config.data.max_length)
    stream = _open_stream(recipe, name, facts, ranks, directory)
    device = start_distributed(ranks)
    record = _record(recipe, name, facts, ranks)
    reader = _resume_point(directory, record, ranks)
    _write_recipe(recipe, directory, ranks)
    vlm, groups, given = _prepare_model(recipe, name, facts, given_from)
    if reader is not None:
        load_weights(vlm, reader)
    engine = _build_engine(config, vlm.to(device), groups, ranks)
    consumed = Consumed()
    if reader is not None:
        engine.load_moments(reader.read, int(reader.state["num_updates"]))
        stream.load_state_dict(reader.state["stream"])
        consumed = Consumed(**reader.state["consumed"])
    return Stage(
        recipe, name, config, directory, ranks, device, facts.text, groups, engine, stream, given, record, consumed
    )


def _resume_point(directory: Path, record: dict[str, Any], ranks: Ranks) -> CheckpointReader | None:
    """The newest sound checkpoint, chosen by the first rank for all; it must have been made by this same stage."""
    found: Path | None = None
    if ranks.is_first:
        found, passed_over = newest(directory / "checkpoints")
        for reason in passed_over:
            print(f"passed over {reason}", flush=True)
    found = ranks.gather(found)[0]
    if found is None:
        return None
    reader = CheckpointReader(found)
    check_same(record, reader)
    if ranks.is_first:
        print(f"going on from {found}", flush=True)
    return reader


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


def _open_stream(recipe: Recipe, name: str, facts: Facts, ranks: Ranks, directory: Path) -> RowStream:
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
        quarantine=directory / "quarantine.jsonl",
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
        "image": facts.image.model_dump(mode="json"),
        "weight_kind": WEIGHT,
    }


def check_same(record: dict[str, Any], reader: CheckpointReader) -> None:
    """Raise InputError that lists the fields in which a run differs from the checkpoint it would go on from."""
    differing = []
    for field in ("seed", "model", "base"):
        if record[field] != reader.state[field]:
            differing.append(field)
    before, now = _binding(reader.state["config"]), _binding(record["config"])
    differing += [field for field in now if now[field] != before.get(field)]
    if differing:
        raise InputError(
            f"{reader.directory}: made with another {', '.join(differing)}; "
            f"take those of {reader.directory.parents[2] / 'recipe.json'}, or start anew with run=ANOTHER_DIRECTORY"
        )


def _binding(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a stage's configuration that a resumption must share."""
    binding = {}
    for field, value in config.items():
        free = FREE_ON_RESUME.get(field, "")
        if free is not None:
            binding[field] = {key: inner for key, inner in value.items() if key != free} if free else value
    return binding
