"""`sightline replay RUN --step N`: computes one step of a run again, on one process, and says which rows cost what."""

from __future__ import annotations

import argparse
from pathlib import Path

from models.errors import InputError, run_cli

TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 2e-2}
"""Relative, between losses: ranks add in another order, and in bf16 the weights before the step have drifted by it."""


def main(argv: list[str]) -> int:
    """0 when rows and loss are those of the run, else 1."""
    parser = argparse.ArgumentParser(prog="sightline replay", description=__doc__)
    parser.add_argument("run", type=Path, help="a run's directory")
    parser.add_argument("--step", type=int, required=True, help="the optimizer step to compute again")
    parser.add_argument("--stage", help="the stage, where the run has several")
    arguments = parser.parse_args(argv)
    recipe_file = arguments.run / "recipe.json"
    if not recipe_file.is_file():
        raise InputError(f"{recipe_file}: not there; give the directory that `run` names in a recipe")

    from trainer.ranks import from_environment
    from trainer.recipe import Recipe
    from trainer.replay import replay

    recipe = Recipe.model_validate_json(recipe_file.read_text(encoding="utf-8"))
    recipe = recipe.model_copy(update={"run": str(arguments.run)})
    stages = [name for name in recipe.stages if (arguments.run / name / "ledger").is_dir()]
    stage = arguments.stage or (stages[0] if len(stages) == 1 else None)
    if stage is None or stage not in stages:
        raise InputError(f"--stage: name one of {', '.join(stages) or 'no stage, since none has a ledger'}")
    from_environment()
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
