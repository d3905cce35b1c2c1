"""`python -m tools.replay`: the command of `tools.inspect.replay` under the name that the docs give it."""

from models.common.errors import run_cli
from tools.inspect.replay import main

__all__ = ["main"]

if __name__ == "__main__":
    raise SystemExit(run_cli(main))
