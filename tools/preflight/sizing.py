"""`python -m tools.preflight.sizing RECIPE --stage S`: memory and hours by number of GPUs and ds_config.

Prints a Markdown table, computed from shapes by preflight's own arithmetic: a GPU's memory at the peak of a step
under each ds_config, and the hours of the stage. Owns the table only. Samples are not read: each counts as
`max_length` tokens, so hours are an upper bound.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING

from models.common.errors import InputError, run_cli

if TYPE_CHECKING:
    from models.shapes import ModelShape
    from tools.preflight.data import Lengths
    from tools.preflight.geometry import PartCount
    from trainer.config.recipe import Recipe
    from trainer.config.schema import StageConfig

DIVISIONS = ("zero2", "zero3", "zero2_offload", "zero3_offload")
GPUS = (1, 8, 64, 512)


def main(argv: list[str]) -> int:
    """Print the table of one stage."""
    arguments = _parse(argv)
    from tools.preflight.__main__ import parse_bytes
    from trainer.config.recipe import load_recipe
    from trainer.flops.utilisation import peak_flops

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    sizing = size_stage(recipe, arguments.stage)
    peak = peak_flops(arguments.device)
    if peak is None:
        raise InputError(f"--device {arguments.device}: its peak is not known; a name like H100 or A100 was expected")
    limit = parse_bytes(arguments.gpu_memory)
    print(f"| GPUs | rows a step and GPU | {' | '.join(DIVISIONS)} | hours on {arguments.device} |")
    print("|" + "---:|" * (len(DIVISIONS) + 3))
    for num_gpus in GPUS:
        cells = [sizing.memory(num_gpus, division, limit) for division in DIVISIONS]
        hours = sizing.hours(num_gpus, peak * arguments.peak_share)
        print(f"| {num_gpus} | {sizing.stage.batch.rank_rows(num_gpus)} | {' | '.join(cells)} | {hours} |")
    return 0


@dataclass(frozen=True)
class StageSizing:
    """The inputs of a stage's memory and hours that do not depend on the number of GPUs."""

    stage: StageConfig
    shape: ModelShape
    counts: dict[str, PartCount]
    lengths: Lengths
    load: str

    def memory(self, num_gpus: int, division: str, limit: float) -> str:
        """GB of one GPU; in brackets if it has less."""
        from tools.preflight.data import row_counts
        from tools.preflight.memory import estimate, read_settings

        rows = self.stage.batch.rows_at_once(num_gpus)
        layers, asked = self.shape.language.num_layers, self.stage.engine.activation_checkpointing
        found = estimate(
            self.shape,
            self.counts,
            self.stage,
            row_counts(self.stage, self.lengths, worst=True).times(rows),
            load=self.load,
            num_gpus=num_gpus,
            settings=read_settings(division),
            num_recomputed=layers if asked is True else int(asked),
        )
        text = f"{found.total / 1e9:.0f} GB"
        return text if found.total <= limit else f"({text})"

    def hours(self, num_gpus: int, flops_per_s: float) -> str:
        """Of the whole stage at so many FLOP/s a GPU; none if some GPUs get no row."""
        from tools.preflight.data import row_counts
        from tools.preflight.hours import num_steps
        from trainer.flops.estimator import flops_estimator

        steps = num_steps(self.stage, self.lengths, None)
        if steps is None:
            raise InputError("the stage lasts epochs: say how many samples, duration={unit: samples, count: N}")
        if num_gpus > self.stage.batch.global_rows:
            return "fewer rows than GPUs"
        row = row_counts(self.stage, self.lengths, worst=False)
        step = row.times(self.stage.batch.global_rows)
        flops = steps * sum(part.total for part in flops_estimator(self.stage, self.shape)(step).values())
        return f"{flops / (flops_per_s * num_gpus) / 3600:.1f}"


def size_stage(recipe: Recipe, name: str) -> StageSizing:
    """The stage's shapes, from each part's config.json or the table of known models."""
    from tools.preflight.geometry import count_parts, find_part
    from tools.preflight.hours import assumed_lengths
    from trainer.flops.shapes import model_shape

    stage, model = recipe.stage(name), recipe.model
    shape = model_shape(model, find_part)
    lengths = assumed_lengths(recipe, name, shape)
    return StageSizing(stage, shape, count_parts(model, stage.tune), lengths, model.language.frozen_format)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.preflight.sizing", description="What a stage needs on 1 to 512 GPUs."
    )
    parser.add_argument("recipe", help="a file of recipes/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="a.b.c=value, set in the recipe")
    parser.add_argument("--stage", required=True)
    parser.add_argument("--gpu-memory", default="80GB", help="of one GPU; default 80GB")
    parser.add_argument("--device", default="H100", help="default H100")
    parser.add_argument(
        "--peak-share", type=float, default=0.35, help="share of the peak that is assumed; default 0.35"
    )
    return parser.parse_intermixed_args(argv)


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
