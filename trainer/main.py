"""Train one stage of a recipe, or all of them one after the other.

deepspeed trainer/main.py recipes/X.yaml --stage align|lora|all [key=value ...]
python -m trainer.main, torchrun trainer/main.py and srun python trainer/main.py take the same arguments.

Exit codes: 0 finished; 2 wrong input, described in one line; 75 stopped by a signal or the job's end, everything saved;
76 a rank was lost; 77 another start has taken over the run. After 75 and 76 the same command resumes.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

# For a script Python puts trainer/ itself first on the path; imports need the folder above it.
if __name__ == "__main__" and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from models.common.errors import InputError, run_cli
from models.common.exit_codes import ExitCode
from trainer.distributed.console import set_up_logging, tolerate_full_disk
from trainer.distributed.context import DistributedContext, from_environment
from trainer.distributed.cores import bound_cores
from trainer.distributed.device import set_allocator
from trainer.distributed.preemption import PreemptionHandler
from trainer.distributed.start import Start, identity
from trainer.ending import exit_code_of, limited_teardown, line_of, say_now

if TYPE_CHECKING:
    from trainer.config.recipe import Recipe
    from trainer.loop import Loop

logger = logging.getLogger("trainer.main")  # as a script this module is called __main__

ALL = "all"
MEETING_FACTOR = 3.0
"""Times the recipe's rank_timeout_s is how long ranks wait for the first one: machines of a job boot apart."""


def main(argv: list[str]) -> int:
    """Run the stages to their end, each resuming from its newest checkpoint."""
    arguments = _parse(argv)
    ranks = from_environment()
    set_up_logging(ranks.rank)
    set_allocator(os.environ)
    preemption = PreemptionHandler.from_environment().install()
    start, code = Start(ranks, identity(argv)).open(), int(ExitCode.FINISHED)
    try:
        with start.phase():
            from trainer.config.recipe import load_recipe

            recipe = load_recipe(arguments.recipe, arguments.overrides)
            names = choose_stages(recipe, arguments.stage, ranks)
            start.timeout_s = MEETING_FACTOR * max(recipe.stage(name).guard.rank_timeout_s for name in names)
            start.meet()
            if any(recipe.stage(name).engine.deterministic for name in names):
                from trainer.engine.determinism import set_workspace

                set_workspace()
            _quiet_libraries(ranks)
        for name in names:
            if _run_stage(recipe, name, ranks, preemption, start) == "stopped":
                code = ExitCode.REQUEUE
                return code
    except BaseException as error:
        say_now(error)
        code = exit_code_of(error)
        if code == 1:  # its traceback is printed
            raise SystemExit(code) from error
        raise
    finally:
        start.close()
        start.linger()
        with limited_teardown(code):
            _leave_distributed()
    return ExitCode.FINISHED


def choose_stages(recipe: Recipe, stage: str, ranks: DistributedContext) -> list[str]:
    """The names of the stages to run, each looked at for what would only be found when its turn comes.

    Raises:
        InputError: no such stage, or one that this many ranks cannot train.
    """
    names = list(recipe.stages) if stage == ALL else [stage]
    for name in names:
        ranks.check_rows(recipe.stage(name).batch.global_rows, f"stages.{name}.batch.global_rows")
    return names


def _run_stage(
    recipe: Recipe, name: str, ranks: DistributedContext, preemption: PreemptionHandler, start: Start
) -> str:
    """How it ended: "finished" or "stopped". A collective that a lost rank broke ends the process and names it.

    Any other error is said, and told to the other ranks, before anything is torn down.
    """
    from trainer.distributed.failures import describe, is_lost_peer
    from trainer.out_of_memory import explained

    with start.phase():
        try:
            loop = _begin(recipe, name, ranks, preemption, start)
        except (RuntimeError, MemoryError) as raised:
            raise explained(raised, recipe, name, ranks)  # noqa: B904 - the cause is set, or it is the same error
    if loop is None:
        return "finished"
    start.close()
    run = loop.run
    try:
        with bound_cores(ranks, os.environ):
            ending = loop.finish()
    except BaseException as raised:
        if ranks.world_size > 1 and is_lost_peer(raised):
            run.services.watchdog.exit_for_lost_rank(describe(raised))
        error = explained(raised, recipe, name, ranks)
        say_now(error)
        code = exit_code_of(error)
        others = code if code in (ExitCode.INPUT_ERROR, ExitCode.REQUEUE) else ExitCode.LOST_RANK
        run.services.watchdog.tell_failure(line_of(error), others)
        with limited_teardown(code):
            run.abandon()
        raise error  # noqa: B904 - the cause is set, or it is the same error
    run.close()
    return ending


def _begin(
    recipe: Recipe, name: str, ranks: DistributedContext, preemption: PreemptionHandler, start: Start
) -> Loop | None:
    """Build a stage up to its first batch, on every rank: what one of them cannot, none of them begins.

    None where the stage is finished.
    """
    from trainer.build import build_stage, find_finished
    from trainer.loop import Loop

    done = find_finished(recipe, name, ranks, start)
    if done is not None:
        logger.info(f"{recipe.name}/{name}: finished already; {done}")
        return None
    run = build_stage(recipe, name, ranks, preemption, start)
    try:
        loop = Loop(run)
        loop.start()
        ranks.barrier()
    except BaseException:
        run.abandon()
        raise
    return loop


def _leave_distributed() -> None:
    """Where the process group was joined at all; what it needs takes seconds to import."""
    if "trainer.engine.process_group" in sys.modules:
        from trainer.engine.process_group import leave_distributed

        leave_distributed()


def _quiet_libraries(ranks: DistributedContext) -> None:
    """One progress bar for all ranks, and no deprecation warnings about calls inside DeepSpeed."""
    import warnings

    from transformers.utils import logging

    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*", category=FutureWarning)
    logging.set_verbosity_error()
    if not ranks.is_first:
        logging.disable_progress_bar()


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
    tolerate_full_disk()
    raise SystemExit(run_cli(main))
