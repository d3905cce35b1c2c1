"""Copies what a job runs into the run directory: `python -m tools.snapshot RECIPE --stage S --job N [key=value ...]`.

    RUN/jobs/N/{trainer, models, ...}   the code as it lay here, committed or not
    RUN/jobs/N/recipe.yaml              the recipe
    RUN/jobs/N/job.json                 words, commit, whether files differed from it, and when

A job that is queued again days later goes on with the code that it began with. Prints RUN/jobs/N; one that is there
already is left as it is. The recipe and the stage's name are checked first. With --plan nothing is copied: prints the
run's directory and the stages, in order.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import time
from pathlib import Path

from models.errors import InputError, run_cli
from models.files import write_json
from trainer.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[1]
CODE = ("trainer", "models", "data_pipeline", "eval", "tools", "ds_configs", "slurm")
LEFT_OUT = ("__pycache__", "logs", "site.env")


def main(argv: list[str]) -> int:
    """Copy, and print where."""
    parser = argparse.ArgumentParser(prog="python -m tools.snapshot", description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--stage")
    parser.add_argument("--job", help="Slurm's number of the job")
    parser.add_argument("--plan", action="store_true", help="print RUN and the stages' names")
    arguments = parser.parse_intermixed_args(argv)
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if arguments.plan:
        print(recipe.run, " ".join(recipe.stages), sep="\n")
        return 0
    if arguments.stage is None or arguments.job is None:
        raise InputError("tools.snapshot: --stage and --job are needed, or --plan")
    recipe.stage(arguments.stage)
    words = {"recipe": str(arguments.recipe), "stage": arguments.stage, "overrides": arguments.overrides}
    print(snapshot(Path(recipe.run).resolve() / "jobs" / arguments.job, arguments.recipe, words))
    return 0


def snapshot(job: Path, recipe: Path, words: dict[str, object]) -> Path:
    """Copy code and recipe to `job`, complete or not at all; `words` go into its job.json."""
    if job.is_dir():
        return job
    passing = job.with_name(f".{job.name}.tmp")
    shutil.rmtree(passing, ignore_errors=True)
    passing.mkdir(parents=True)
    for name in CODE:
        shutil.copytree(ROOT / name, passing / name, ignore=shutil.ignore_patterns(*LEFT_OUT))
    shutil.copyfile(recipe, passing / "recipe.yaml")
    write_json(passing / "job.json", {**words, **_origin(), "made": time.strftime("%Y-%m-%d %H:%M:%S")})
    passing.rename(job)
    return job


def _origin() -> dict[str, object]:
    """The commit that the code came from, where git knows it."""
    commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    return {"commit": commit.strip(), "changed": [line[3:] for line in changes.splitlines()]}


def _git(*words: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout if done.returncode == 0 else ""


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
