"""`python -m tools.families`: train every family's twin, bundle and score it; a second run goes on or reuses."""

from __future__ import annotations

import argparse
from pathlib import Path

from models.errors import InputError, run_cli
from tools.families.report import write_report
from tools.families.steps import TWINS, Sizes, plan
from tools.quickstart.runner import Runner


def main(argv: list[str]) -> int:
    """Run what is not done yet; write RUN/report.json and RUN/report.html."""
    names = [twin.recipe for twin in TWINS]
    parser = argparse.ArgumentParser(prog="tools.families", description=__doc__)
    parser.add_argument("twins", nargs="*", metavar="TWIN", help=f"some of {', '.join(names)}; default: all")
    parser.add_argument("--run", type=Path, default=Path("runs/families"), help="where everything goes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sizes", default="{}", help="JSON that changes tools.families.steps.Sizes")
    arguments = parser.parse_args(argv)
    chosen = arguments.twins or names
    unknown = sorted(set(chosen) - set(names))
    if unknown:
        raise InputError(f"{unknown[0]}: no such twin; there are {', '.join(names)}")
    run: Path = arguments.run
    run.mkdir(parents=True, exist_ok=True)
    steps = plan(run, Sizes.model_validate_json(arguments.sizes), arguments.seed, chosen)
    runner = Runner(run, steps)
    runner.run()
    twins = [twin for twin in TWINS if twin.recipe in chosen]
    for name, line in write_report(twins, run, runner.seconds).items():
        retrieval = "" if line["recall_at_1"] is None else f", Recall@1 {line['recall_at_1']:.2f}"
        print(f"{name:28s} {line['vqa_accuracy']:5.1f} %, exchanged {line['vqa_accuracy_shuffled']:5.1f} %{retrieval}")
    print(f"report  {run / 'report.html'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
