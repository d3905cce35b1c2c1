"""`python -m tools.versions`: the command of `tools.inspect.versions` under the name that the docs give it."""

from models.common.errors import run_cli
from tools.inspect.versions import main

__all__ = ["main"]

if __name__ == "__main__":
    raise SystemExit(run_cli(main))
