"""Copies a job's code into the run directory: `python -m tools.snapshot RECIPE --stage S --job N [key=value ...]`.

    RUN/jobs/N/{trainer, models, ...}   the code in this directory, committed or not
    RUN/jobs/N/recipe.yaml              the recipe
    RUN/jobs/N/job.json                 the command's arguments, the commit, the differences from it, and the time

A job that is requeued days later resumes with the code that it began with. Prints RUN/jobs/N; an existing one is kept.
The recipe and the stage's name are checked first. With --plan nothing is copied: prints the run's directory and the
stages, in order.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import time
from pathlib import Path

from models.common.errors import InputError, run_cli
from models.common.files import new_directory, write_json
from trainer.config.recipe import load_recipe
from trainer.config.shipped import find_recipe

ROOT = Path(__file__).resolve().parents[2]
CODE = ("trainer", "models", "data_pipeline", "eval", "tools", "ds_configs", "slurm")
LEFT_OUT = ("__pycache__", "logs", "site.env")


def main(argv: list[str]) -> int:
    """Copy code and recipe for a job and print their directory, or with --plan print the run and its stages."""
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
    request: dict[str, object] = {
        "recipe": str(arguments.recipe),
        "stage": arguments.stage,
        "overrides": arguments.overrides,
        "rank_timeout_s": recipe.stage(arguments.stage).guard.rank_timeout_s,  # launch.sh: how long srun waits
    }
    print(snapshot(Path(recipe.run).resolve() / "jobs" / arguments.job, arguments.recipe, request))
    return 0


def snapshot(job: Path, recipe: Path, request: dict[str, object]) -> Path:
    """Copy code and recipe to `job`, atomically; `request` goes into its job.json."""
    if job.is_dir():
        return job
    with new_directory(job) as copy:
        for name in CODE:
            if (ROOT / name).is_dir():  # installed, ds_configs lies in trainer, and the job's scripts are a checkout's
                shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns(*LEFT_OUT))
        shutil.copyfile(ROOT / "sightline_packages.py", copy / "sightline_packages.py")
        shutil.copyfile(find_recipe(recipe), copy / "recipe.yaml")
        write_json(copy / "job.json", {**request, **_origin(), "made": time.strftime("%Y-%m-%d %H:%M:%S")})
    return job


def _origin() -> dict[str, object]:
    """The commit of the code, where this is a git checkout."""
    commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    return {"commit": commit.strip(), "changed": [line[3:] for line in changes.splitlines()]}


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout if done.returncode == 0 else ""


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
