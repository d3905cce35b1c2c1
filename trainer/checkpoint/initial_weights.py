"""What a stage starts from: finished checkpoints, loading weights into a model and handing them on, the base's digests.

Without DeepSpeed and without a process group, so that merging needs neither.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor, nn

from models.common.errors import InputError
from models.placement import local_slice, share_of
from models.vlm import VLM
from trainer.checkpoint.format import WEIGHT, Fragment
from trainer.checkpoint.reader import CheckpointReader
from trainer.checkpoint.records import checkpoint_named
from trainer.config.recipe import Recipe
from trainer.distributed.context import DistributedContext


def finished_checkpoint(run: Path, stage: str) -> Path | None:
    """The last checkpoint of a finished stage, named in its finished.json; None where it has not finished.

    Args:
        run: the run's directory, which holds one directory a stage.
    """
    if not (run / stage / "finished.json").is_file():
        return None
    return checkpoint_named(run / stage)


def load_weights(vlm: VLM, reader: CheckpointReader) -> list[str]:
    """Copy every weight of a checkpoint into the model, in place; of a divided one this rank's elements alone.

    A matrix that was fully trained in an earlier stage and has an adapter here becomes the adapter's base.

    Returns:
        The names of the loaded parameters in the model.

    Raises:
        InputError: the model has no such parameter, or one of another shape.
    """
    parameters = dict(vlm.named_parameters())
    loaded: list[str] = []
    direct: list[tuple[str, int, Tensor]] = []
    for name in reader.names():
        target = name if name in parameters else adapted_name(name)
        if target not in parameters:
            hint = "; tune.language must be lora here too" if ".lora_" in name else ""
            raise InputError(f"{reader.directory}: it holds {name}, which this stage's model does not have{hint}")
        if tuple(parameters[target].shape) != reader.shape(name):
            found, expected = reader.shape(name), tuple(parameters[target].shape)
            raise InputError(f"{reader.directory}: {name} has shape {found}, this stage's model wants {expected}")
        parameter = parameters[target]
        if share_of(parameter) is not None or parameter.data.is_contiguous():
            direct.append((name, *local_slice(parameter)))
        else:
            parameter.data.copy_(reader.weight(name))
        loaded.append(target)
    reader.fill(WEIGHT, direct)
    return loaded


def inherited_fragments(
    parameters: Mapping[str, nn.Parameter], names: Iterable[str], ranks: DistributedContext
) -> list[Fragment]:
    """What this rank writes of weights that do not learn: its share of divided ones, and the first rank whole ones."""
    found = []
    for name in names:
        parameter, share = parameters[name], share_of(parameters[name])
        if share is not None:
            found.append(Fragment(name, tuple(parameter.shape), share.start, share.values, {}))
        elif ranks.is_first:
            found.append(Fragment(name, tuple(parameter.shape), 0, parameter.data, {}))
    return found


def adapted_name(name: str) -> str:
    """The name that a module's own parameter gets when peft adds an adapter to the module."""
    module, _, leaf = name.rpartition(".")
    return f"{module}.base_layer.{leaf}"


def base_digests(recipe: Recipe) -> dict[str, str]:
    """The sha256 of each pretrained part by its key in the recipe's `model`.

    A checkpoint holds what was trained and relies on them for the rest, so it records them.
    """
    found = {"vision": recipe.model.vision.weights_digest(), "language": recipe.model.language.weights_digest()}
    return {part: digest for part, digest in found.items() if digest is not None}
