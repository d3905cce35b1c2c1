"""`python -m tools.report`: the command of `tools.examples.report` under the name that the docs give it."""

from models.common.errors import run_cli
from tools.examples.report.__main__ import main

__all__ = ["main"]

if __name__ == "__main__":
    raise SystemExit(run_cli(main))
