"""What a stage starts from: finished checkpoints of a run, weights put into a model, and the identity of the base.

Without DeepSpeed and without a process group, so that merging needs neither.
"""

from __future__ import annotations

from pathlib import Path

from models.errors import InputError
from models.source import part_digest, read_json
from models.vlm import VLM
from trainer.checkpoint import CheckpointReader
from trainer.recipe import Recipe


def finished_checkpoint(run: Path, stage: str) -> Path | None:
    """The last checkpoint of a stage that ran to its end, or None."""
    if not (run / stage / "finished.json").is_file():
        return None
    return run / stage / "checkpoints" / str(read_json(run / stage, "finished.json")["checkpoint"])


def load_weights(vlm: VLM, reader: CheckpointReader) -> list[str]:
    """Copy every weight of a checkpoint into the model, strictly; their names in the model.

    A matrix that learnt in full before it got an adapter is that adapter's base.
    """
    parameters = dict(vlm.named_parameters())
    loaded = []
    for name in reader.names():
        place = name if name in parameters else adapted_name(name)
        if place not in parameters:
            hint = "; tune.language must be lora here too" if ".lora_" in name else ""
            raise InputError(f"{reader.directory}: it holds {name}, which this stage's model does not have{hint}")
        if tuple(parameters[place].shape) != reader.shape(name):
            found, expected = reader.shape(name), tuple(parameters[place].shape)
            raise InputError(f"{reader.directory}: {name} has shape {found}, this stage's model wants {expected}")
        parameters[place].data.copy_(reader.weight(name))
        loaded.append(place)
    return loaded


def adapted_name(name: str) -> str:
    """What a parameter is called once its module has an adapter (peft)."""
    module, _, leaf = name.rpartition(".")
    return f"{module}.base_layer.{leaf}"


def base_digests(recipe: Recipe) -> dict[str, str]:
    """The sha256 of the pretrained parts: a checkpoint without them is only half a model."""
    found = {"vision": part_digest(recipe.model.vision), "language": part_digest(recipe.model.language)}
    return {part: digest for part, digest in found.items() if digest is not None}
