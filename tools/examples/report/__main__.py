"""`python -m tools.report RUN`: write a run's report again, from its evaluations and logs."""

from __future__ import annotations

import argparse
from pathlib import Path

from models.common.errors import run_cli


def main(argv: list[str]) -> int:
    """Read RUN, write RUN/report.{json,txt,html} and print the text."""
    parser = argparse.ArgumentParser(prog="python -m tools.report", description=__doc__)
    parser.add_argument("run", type=Path, help="a folder with eval/STAGE.json and STAGE/metrics.jsonl")
    parser.add_argument("--out", type=Path, help="the folder to write to (default: RUN)")
    parser.add_argument("--title", default="Quickstart", help="of the page (default: %(default)s)")
    arguments = parser.parse_args(argv)

    from tools.examples.report import build_report, read_run

    report = build_report(arguments.out or arguments.run, title=arguments.title, **read_run(arguments.run))
    print(report.printed)
    print(f"page: {report.html}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
