"""Train one stage of a recipe, or all of them one after the other.

deepspeed trainer/main.py recipes/X.yaml --stage align|lora|all [key=value ...]
python -m trainer.main, torchrun trainer/main.py and srun python trainer/main.py take the same words.

Exit codes: 0 finished; 2 something to mend, said in one line; 75 stopped by a signal or the job's end, everything
saved; 76 a rank was lost; 77 another start has taken the run over. After 75 and 76 the same command goes on.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

# As a script Python puts trainer/ itself first on the path; ours is the folder above it.
if __name__ == "__main__" and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from models.errors import EXIT_INPUT_ERROR, InputError, run_cli
from trainer.interrupt import EXIT_REQUEUE, Interrupt
from trainer.printing import be_patient
from trainer.ranks import Ranks, from_environment
from trainer.recipe import Recipe, load_recipe

ALL = "all"


def main(argv: list[str]) -> int:
    """Run the stages to their end, going on from the newest checkpoint."""
    arguments = _parse(argv)
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    names = list(recipe.stages) if arguments.stage == ALL else [arguments.stage]
    for name in names:
        recipe.stage(name)
    ranks = from_environment()
    interrupt = Interrupt().install()
    _quiet_libraries(ranks)
    from trainer.engine import leave_distributed

    try:
        for name in names:
            if _run_stage(recipe, name, ranks, interrupt) == "stopped":
                return EXIT_REQUEUE
    finally:
        leave_distributed()
    return 0


def _run_stage(recipe: Recipe, name: str, ranks: Ranks, interrupt: Interrupt) -> str:
    """How it ended: "finished" or "stopped". A collective that a lost rank broke ends the process with a name."""
    from trainer.loop import fit
    from trainer.opening import open_stage
    from trainer.watch import leave_at_start
    from trainer.weights import finished_checkpoint

    done = finished_checkpoint(Path(recipe.run), name)
    if done is not None:
        if ranks.is_first:
            print(f"{recipe.name}/{name}: finished already; {done}", flush=True)
        return "finished"
    stage = None
    try:
        stage = open_stage(recipe, name, ranks, interrupt)
        ending = fit(stage)
    except RuntimeError as error:
        if ranks.world_size == 1 or "onnection" not in str(error):
            raise
        if stage is not None:
            stage.watch.leave_for_lost_rank(str(error))
        leave_at_start(ranks, str(error))
    finally:
        if stage is not None and stage.lock is not None:
            stage.lock.release()
    stage.close()
    return ending


def _quiet_libraries(ranks: Ranks) -> None:
    """One progress bar for all ranks, and no warning about a call that DeepSpeed, not we, should modernise."""
    import warnings

    from transformers.utils import logging

    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*", category=FutureWarning)
    logging.set_verbosity_error()
    if not ranks.is_first:
        logging.disable_progress_bar()


def quiet_followers(run: Callable[[list[str]], int]) -> Callable[[list[str]], int]:
    """Every rank finds the same fault in a recipe, and is told of any that one rank found; the first one says so."""

    def main_of_one_rank(argv: list[str]) -> int:
        try:
            return run(argv)
        except InputError:
            if os.environ.get("RANK", "0") != "0":
                return EXIT_INPUT_ERROR
            raise

    return main_of_one_rank


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="trainer/main.py", description="Train one stage of a recipe.")
    parser.add_argument("recipe", help="a file of recipes/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="a.b.c=value, set in the recipe")
    parser.add_argument("--stage", required=True, help=f"the stage's name in the recipe, or {ALL}")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    arguments = parser.parse_intermixed_args(argv)
    if any("=" not in override for override in arguments.overrides):
        raise InputError(f"{arguments.overrides}: after the recipe come key=value pairs only")
    return arguments


if __name__ == "__main__":
    be_patient()
    raise SystemExit(run_cli(quiet_followers(main)))
