"""`python -m tools.photos`: the command of `tools.examples.photos` under the name that the docs give it."""

from models.common.errors import run_cli
from tools.examples.photos.__main__ import main

__all__ = ["main"]

if __name__ == "__main__":
    raise SystemExit(run_cli(main))
