"""`python -m tools.snapshot`: the command of `tools.inspect.snapshot` under the name that the docs give it."""

from models.common.errors import run_cli
from tools.inspect.snapshot import main

__all__ = ["main"]

if __name__ == "__main__":
    raise SystemExit(run_cli(main))
