"""Memory that ran out, as wrong input: what to lower, and what preflight had computed.

The same rows on the same device run out of memory again, on any machine. So it ends with exit code 2: Slurm does not
start the job again, and no node is blamed.
"""

from __future__ import annotations

import socket
from pathlib import Path

from models.common.documents import read_json
from models.common.errors import InputError
from models.common.memory import is_out_of_memory
from trainer.config.recipe import Recipe
from trainer.config.schema import StageConfig
from trainer.distributed.context import DistributedContext
from trainer.distributed.failures import describe

MARGIN = 0.95
"""Share of the memory that ran out which advice is to stay below: an allocator cannot use all of it."""


def preflight_file(run: Path, stage: str) -> Path:
    """Where preflight leaves the memory that it computed for a stage."""
    return run / "preflight" / f"{stage}.json"


def explained(error: BaseException, recipe: Recipe, name: str, ranks: DistributedContext) -> BaseException:
    """An InputError with what to change where memory ran out; any other error as it is."""
    if not is_out_of_memory(error):
        return error
    found = _read(preflight_file(Path(recipe.run), name))
    advice = _advice(recipe.stage(name), f"stages.{name}", ranks.world_size, found)
    line = (
        f"rank {ranks.rank} ({socket.gethostname()}) ran out of memory: {describe(error)} Another machine would, too: "
        f"{advice}; {_told(found, name)}"
    )
    explanation = InputError(line)
    explanation.__cause__ = error
    return explanation


def _read(file: Path) -> dict[str, object]:
    try:
        return dict(read_json(file.parent, file.name))
    except (InputError, TypeError, ValueError):
        return {}


def _advice(config: StageConfig, stage: str, world_size: int, found: dict[str, object]) -> str:
    ways = []
    rows = config.batch.rows_at_once(world_size)
    if rows > 1 and config.objective.compares_rows:  # which needs a rank's rows at once
        ways.append(f"{stage}.batch.global_rows={config.batch.global_rows // 2} (it is {config.batch.global_rows})")
    elif rows > 1:
        ways.append(f"{stage}.batch.micro_rows={rows // 2} (a rank takes {rows} rows at once)")
    layers = layers_to_recompute(config.engine.activation_checkpointing, found)
    if layers:
        now = int(config.engine.activation_checkpointing)
        ways.append(f"{stage}.engine.activation_checkpointing={layers} (layers to recompute; it is {now})")
    elif not config.engine.activation_checkpointing:
        ways.append(f"{stage}.engine.activation_checkpointing=true (every layer is recomputed; none is now)")
    if not ways:
        ways.append(f"{stage}.engine.zero=zero3 or zero3_offload (it is {config.engine.zero}), or a quantized base")
    return "set " + ", or ".join(ways)


def layers_to_recompute(asked: bool | int, found: dict[str, object]) -> int:
    """The fewest layers that preflight's own arithmetic calls enough, corrected by how far it was off; 0: none is.

    Args:
        asked: `engine.activation_checkpointing` of the step that ran out of memory.
        found: what preflight left: bytes by the number of recomputed layers, and those of the GPU.
    """
    totals, has = found.get("bytes_by_recomputed"), found.get("gpu_bytes")
    if asked is True or not isinstance(totals, list) or not isinstance(has, float | int) or int(asked) >= len(totals):
        return 0
    # The step needed more than the GPU has, whatever was computed.
    correction = max(1.0, has / totals[int(asked)])
    fitting = (n for n in range(int(asked) + 1, len(totals)) if totals[n] * correction <= MARGIN * has)
    return next(fitting, 0)


def _told(found: dict[str, object], name: str) -> str:
    totals, has = found.get("bytes_by_recomputed"), found.get("gpu_bytes")
    if not isinstance(totals, list) or not isinstance(has, float | int):
        return f"preflight has computed nothing for this run: sightline preflight RECIPE --stage {name}"
    asked = min(int(str(found["num_recomputed"])), len(totals) - 1)
    return (
        f"preflight had computed {totals[asked] / 1e9:.1f} GB of {has / 1e9:.1f} GB for"
        f" micro_rows={found['micro_rows']} and {asked} recomputed layers on {found['num_gpus']} GPUs"
        f" under {found['zero']}"
    )
