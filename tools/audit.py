"""`python -m tools.audit`: the command of `tools.inspect.audit` under the name that the docs give it."""

from models.common.errors import run_cli
from tools.inspect.audit import main

__all__ = ["main"]

if __name__ == "__main__":
    raise SystemExit(run_cli(main))
