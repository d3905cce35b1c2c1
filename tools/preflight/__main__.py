"""`sightline preflight RECIPE [key=value]`: checks a job before it is queued, without a GPU.

For every stage (or --stage): parameters, data and masks, memory a GPU, disk, steps and hours. Exit code 1 with a line
for each reason not to start, 0 without one. What cannot be checked on this machine is listed. --numerics also computes
gradients on this machine.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from models.common.errors import InputError, run_cli

if TYPE_CHECKING:
    from tools.preflight.machine import Machine
    from trainer.config.recipe import Recipe


def main(argv: list[str]) -> int:
    """Check the requested stages; returns 0 if no problem was found, else 1."""
    arguments = _parse(argv)
    from transformers.utils import logging

    from tools.preflight.machine import Machine
    from tools.preflight.report import Report
    from tools.preflight.stage import StageCheck
    from trainer.config.recipe import load_recipe

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if arguments.run is not None:
        recipe = recipe.model_copy(update={"run": str(arguments.run)})
    machine = Machine(
        arguments.gpus,
        parse_bytes(arguments.gpu_memory),
        arguments.device,
        arguments.peak_share,
        arguments.samples,
        arguments.numerics,
    )
    report = Report()
    _describe(recipe, machine)
    for name in [arguments.stage] if arguments.stage else list(recipe.stages):
        StageCheck(recipe, name, machine, report).run()
    return report.close()


def _describe(recipe: Recipe, machine: Machine) -> None:
    print(f"{recipe.name} on {machine.num_gpus} GPUs of {machine.gpu_bytes / 1e9:g} GB ({machine.device})")


def parse_bytes(text: str) -> float:
    """`80GB` or `24GiB` in bytes; a number alone is in GB."""
    units = {"GIB": 2**30, "GB": 1e9, "G": 1e9, "": 1e9}
    upper = text.strip().upper()
    number = upper.rstrip("GIB")
    try:
        value = float(number) * units[upper[len(number) :]]
    except (ValueError, KeyError):
        raise InputError(f"--gpu-memory {text}: a size like 80GB or 24GiB was expected") from None
    if value <= 0:
        raise InputError(f"--gpu-memory {text}: more than 0 was expected")
    return value


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="sightline preflight", description="Find what a job would run into before it is queued."
    )
    add = parser.add_argument
    add("recipe", help="a file of recipes/")
    add("overrides", nargs="*", metavar="key=value", help="a.b.c=value, set in the recipe")
    add("--stage", help="only this stage; default: all")
    add("--gpus", type=int, default=1, help="how many GPUs the job gets; default 1")
    add("--gpu-memory", default="80GB", help="of one GPU; default 80GB")
    add("--device", default="H100", help="whose peak the hours are computed from; default H100")
    add("--peak-share", type=float, default=0.35, help="share of the peak that the run is assumed to reach")
    add("--samples", type=int, default=64, help="samples to encode and measure; default 64")
    add("--numerics", action="store_true", help="compute a few samples' gradient in the stage's precision and in fp32")
    add("--run", type=Path, help="another run directory than the recipe's")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.gpus < 1 or arguments.samples < 1 or not 0 < arguments.peak_share <= 1:
        raise InputError("--gpus and --samples are at least 1, --peak-share is above 0 and at most 1")
    return arguments


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
