"""`python -m tools.demo`: the command of `tools.serve` under the name that the docs give it."""

from models.common.errors import run_cli
from tools.serve.demo import main

__all__ = ["main"]

if __name__ == "__main__":
    raise SystemExit(run_cli(main))
