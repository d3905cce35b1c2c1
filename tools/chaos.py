"""`python -m tools.chaos`: the command of `tools.dev.chaos` under the name that the docs give it."""

from models.common.errors import run_cli
from tools.dev.chaos.__main__ import main

__all__ = ["main"]

if __name__ == "__main__":
    raise SystemExit(run_cli(main))
