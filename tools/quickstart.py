"""`python -m tools.quickstart`: the command of `tools.examples.quickstart` under the name that the docs give it."""

from models.common.errors import run_cli
from tools.examples.quickstart.__main__ import main

__all__ = ["main"]

if __name__ == "__main__":
    raise SystemExit(run_cli(main))
