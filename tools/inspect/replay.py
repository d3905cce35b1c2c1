"""`sightline replay RUN --step N`: recomputes one step of a run on one process, and prints the loss of each row."""

from __future__ import annotations

import argparse
from pathlib import Path

from models.common.errors import InputError, run_cli
from tools.inspect.stages import choose_stage

TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 2e-2}
"""Relative, between losses: ranks sum in another order, and in bf16 the weights before the step differ by that."""


def main(argv: list[str]) -> int:
    """Recompute the step and print its rows; returns 0 if rows and loss equal the run's, else 1."""
    parser = argparse.ArgumentParser(prog="sightline replay", description=__doc__)
    parser.add_argument("run", type=Path, help="a run's directory")
    parser.add_argument("--step", type=int, required=True, help="the optimizer step to compute again")
    parser.add_argument("--stage", help="the stage, where the run has several")
    arguments = parser.parse_args(argv)
    recipe_file = arguments.run / "recipe.json"
    if not recipe_file.is_file():
        raise InputError(f"{recipe_file}: not there; give the directory that `run` names in a recipe")

    from trainer.config.recipe import load_recipe
    from trainer.distributed.console import set_up_logging
    from trainer.distributed.context import from_environment
    from trainer.replay import replay

    recipe = load_recipe(recipe_file).model_copy(update={"run": str(arguments.run)})
    stage = choose_stage(arguments.run, arguments.stage)
    set_up_logging(from_environment().rank)
    found = replay(recipe, stage, arguments.step)
    rows = sorted(zip(found.row_losses, found.rows, strict=True), key=lambda pair: -pair[0])
    for loss_sum, row in rows:
        num_targets = sum(sample.num_targets for sample in row)
        names = ", ".join(f"{sample.shard} {sample.key}" for sample in row)
        print(f"  {loss_sum / max(num_targets, 1):10.4f}  {num_targets:6d} targets  {names}")
    print(
        f"step {found.step} (global batch {found.batch}) from {found.checkpoint}: loss {found.loss:.9g}, logged "
        f"{found.logged_loss:.9g}, relative difference {found.difference:.2e}; "
        f"{'the same rows' if found.same_rows else 'OTHER ROWS than the ledger says'}"
    )
    bound = TOLERANCE[recipe.stage(stage).engine.precision]
    return 0 if found.same_rows and found.difference <= bound else 1


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
