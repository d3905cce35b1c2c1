"""`python -m tools.quantize`: the command of `tools.export.quantize` under the name that the docs give it."""

from models.common.errors import run_cli
from tools.export.quantize import main

__all__ = ["main"]

if __name__ == "__main__":
    raise SystemExit(run_cli(main))
