"""`python -m tools.quickstart`: draw the synthetic world, train on it, bundle, score, report."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from models.common.documents import read_value
from models.common.errors import run_cli
from models.common.files import write_json
from tools.examples.quickstart.runner import Runner
from tools.examples.quickstart.steps import QuickstartSizes, plan, suite


def main(argv: list[str]) -> int:
    """Run what is not done yet; print the scores, the bundle's path and how to open it."""
    parser = argparse.ArgumentParser(prog="tools.quickstart", description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart"), help="where everything goes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--sizes", default="{}", help="JSON that changes tools.examples.quickstart.steps.QuickstartSizes"
    )
    arguments = parser.parse_args(argv)
    run: Path = arguments.run
    sizes = QuickstartSizes.model_validate_json(arguments.sizes)
    run.mkdir(parents=True, exist_ok=True)
    (run / "suite.yaml").write_text(suite(run, sizes), encoding="utf-8")
    *steps, report = plan(run, sizes, arguments.seed)
    started_s = time.monotonic()
    measured = Runner(run, steps)
    try:
        measured.run()
    finally:
        add_seconds(run, measured, time.monotonic() - started_s)
    Runner(run, [*steps, report]).run()
    print(f"\n{(run / 'report.txt').read_text(encoding='utf-8').rstrip()}\n")
    print(f"report  {run / 'report.html'}\nbundle  {run / 'bundle'}")
    print(f"talk to it:  .venv/bin/sightline demo {run / 'bundle'}")
    return 0


def add_seconds(run: Path, runner: Runner, elapsed_s: float) -> None:
    """RUN/seconds.json: each step's seconds, and the wall time of all runs that did any work together."""
    file = run / "seconds.json"
    before = read_value(file)["total"] if file.is_file() else 0.0
    fresh = set(runner.seconds) - runner.done_before
    total = round(before + (elapsed_s if fresh else 0.0), 1)
    write_json(file, {**runner.seconds, "total": total})


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
