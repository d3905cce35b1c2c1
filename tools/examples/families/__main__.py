"""`python -m tools.families`: train every family's tiny config, bundle and score it; a second run resumes, and reuses
what is done.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from models.common.errors import InputError, run_cli
from tools.examples.families.report import write_report
from tools.examples.families.steps import TINY_CONFIGS, FamilySizes, plan
from tools.examples.quickstart.runner import Runner


def main(argv: list[str]) -> int:
    """Run what is not done yet; write RUN/report.json and RUN/report.html."""
    names = [config.recipe for config in TINY_CONFIGS]
    parser = argparse.ArgumentParser(prog="tools.families", description=__doc__)
    parser.add_argument("configs", nargs="*", metavar="NAME", help=f"some of {', '.join(names)}; default: all")
    parser.add_argument("--run", type=Path, default=Path("runs/families"), help="where everything goes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sizes", default="{}", help="JSON that changes tools.examples.families.steps.FamilySizes")
    arguments = parser.parse_args(argv)
    chosen = arguments.configs or names
    unknown = sorted(set(chosen) - set(names))
    if unknown:
        raise InputError(f"{unknown[0]}: no such tiny config; there are {', '.join(names)}")
    run: Path = arguments.run
    run.mkdir(parents=True, exist_ok=True)
    steps = plan(run, FamilySizes.model_validate_json(arguments.sizes), arguments.seed, chosen)
    runner = Runner(run, steps)
    runner.run()
    configs = [config for config in TINY_CONFIGS if config.recipe in chosen]
    for name, line in write_report(configs, run, runner.seconds).items():
        retrieval = "" if line["recall_at_1"] is None else f", Recall@1 {line['recall_at_1']:.2f}"
        print(f"{name:28s} {line['vqa_accuracy']:5.1f} %, exchanged {line['vqa_accuracy_shuffled']:5.1f} %{retrieval}")
    print(f"report  {run / 'report.html'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
