"""Open a page to talk to a bundle: `sightline demo BUNDLE`. It is `sightline serve` with a page in front."""

from __future__ import annotations

import argparse

from tools.serve.arguments import add_address, add_limits


def main(argv: list[str]) -> int:
    """Serve the page until it is interrupted."""
    parser = argparse.ArgumentParser(prog="python -m tools.demo", description=__doc__)
    add_address(parser, port=None, ports="the first free one from 7860")
    add_limits(parser)
    parser.add_argument("--share", action="store_true", help="also open a public address through gradio.live")
    parser.set_defaults(page=True, fetch=True)
    arguments = parser.parse_args(argv)

    from tools.serve.command import run

    return run(arguments)
