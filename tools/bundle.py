"""`python -m tools.bundle`: the command of `tools.export.bundle` under the name that the docs give it."""

from models.common.errors import run_cli
from tools.export.bundle import main

__all__ = ["main"]

if __name__ == "__main__":
    raise SystemExit(run_cli(main))
