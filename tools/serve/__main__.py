"""Serve a bundle to programs, and to people with --page: `sightline serve BUNDLE`.

OpenAI's chat completions under /v1, a REST API, /health, /metrics and /docs; docs/serving.md.
"""

from __future__ import annotations

import argparse

from models.common.errors import run_cli
from tools.serve.arguments import add_address, add_limits


def main(argv: list[str]) -> int:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(prog="sightline serve", description=__doc__)
    add_address(parser, port=8000, ports="8000")
    add_limits(parser)
    parser.add_argument("--page", action="store_true", help="also show the page of `sightline demo`, at /")
    parser.set_defaults(share=False)
    arguments = parser.parse_args(argv)

    from tools.serve.command import run

    return run(arguments)


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
