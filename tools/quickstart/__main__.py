"""`python -m tools.quickstart`: draw the small world, train on it, bundle, score, report."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from models.errors import run_cli
from models.files import write_json
from tools.quickstart.runner import Runner
from tools.quickstart.steps import Sizes, plan, suite


def main(argv: list[str]) -> int:
    """Run what is not done yet; print what was measured, where the bundle lies and how to open it."""
    parser = argparse.ArgumentParser(prog="tools.quickstart", description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart"), help="where everything goes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sizes", default="{}", help="JSON that changes tools.quickstart.steps.Sizes")
    arguments = parser.parse_args(argv)
    run: Path = arguments.run
    sizes = Sizes.model_validate_json(arguments.sizes)
    run.mkdir(parents=True, exist_ok=True)
    (run / "suite.yaml").write_text(suite(run, sizes), encoding="utf-8")
    *steps, report = plan(run, sizes, arguments.seed)
    started_s = time.monotonic()
    measured = Runner(run, steps)
    try:
        measured.run()
    finally:
        _add_seconds(run, measured, time.monotonic() - started_s)
    Runner(run, [*steps, report]).run()
    print(f"\n{(run / 'report.txt').read_text(encoding='utf-8').rstrip()}\n")
    print(f"report  {run / 'report.html'}\nbundle  {run / 'bundle'}")
    print(f"talk to it:  .venv/bin/sightline demo {run / 'bundle'}")
    return 0


def _add_seconds(run: Path, runner: Runner, elapsed_s: float) -> None:
    """RUN/seconds.json: each step's seconds, and the wall time of all runs that did any work together."""
    file = run / "seconds.json"
    before = json.loads(file.read_text())["total"] if file.is_file() else 0.0
    fresh = set(runner.seconds) - runner.done_before
    total = round(before + (elapsed_s if fresh else 0.0), 1)
    write_json(file, {**runner.seconds, "total": total})


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
