"""Train one stage of a recipe.

deepspeed trainer/main.py recipes/X.yaml --stage align [key=value ...]
python -m trainer.main, torchrun trainer/main.py and srun python trainer/main.py take the same words.
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
from trainer.ranks import Ranks, from_environment
from trainer.recipe import load_recipe


def main(argv: list[str]) -> int:
    """Run the stage to its end, going on from its newest checkpoint; 0 when it is finished."""
    arguments = _parse(argv)
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    recipe.stage(arguments.stage)
    ranks = from_environment()
    run = Path(recipe.run)

    _quiet_libraries(ranks)
    from trainer.loop import fit
    from trainer.stage import open_stage
    from trainer.weights import finished_checkpoint

    done = finished_checkpoint(run, arguments.stage)
    if done is not None:
        if ranks.is_first:
            print(f"{recipe.name}/{arguments.stage}: finished already; {done}")
        return 0
    stage = open_stage(recipe, arguments.stage, ranks)
    fit(stage)
    stage.close()
    return 0


def _quiet_libraries(ranks: Ranks) -> None:
    """One progress bar for all ranks, and no warning about a call that DeepSpeed, not we, should modernise."""
    import warnings

    from transformers.utils import logging

    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*", category=FutureWarning)
    logging.set_verbosity_error()
    if not ranks.is_first:
        logging.disable_progress_bar()


def quiet_followers(run: Callable[[list[str]], int]) -> Callable[[list[str]], int]:
    """Every rank finds the same fault in a recipe; before the ranks have met, only the first one says so."""

    def main_of_one_rank(argv: list[str]) -> int:
        try:
            return run(argv)
        except InputError:
            import torch.distributed

            if os.environ.get("RANK", "0") != "0" and not torch.distributed.is_initialized():
                return EXIT_INPUT_ERROR
            raise

    return main_of_one_rank


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="trainer/main.py", description="Train one stage of a recipe.")
    parser.add_argument("recipe", help="a file of recipes/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="a.b.c=value, set in the recipe")
    parser.add_argument("--stage", required=True, help="the stage's name in the recipe")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    arguments = parser.parse_intermixed_args(argv)
    if any("=" not in override for override in arguments.overrides):
        raise InputError(f"{arguments.overrides}: after the recipe come key=value pairs only")
    return arguments


if __name__ == "__main__":
    raise SystemExit(run_cli(quiet_followers(main)))
