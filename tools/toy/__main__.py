"""`python -m tools.toy VERB ...`: make the small world, pretrain its backbones, or import a llama2.c file."""

from __future__ import annotations

import argparse
from pathlib import Path

from models.errors import run_cli


def main(argv: list[str]) -> int:
    """Parse the line and do what its verb says."""
    arguments = _parser().parse_args(argv)
    code: int = arguments.run(arguments)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.toy", description=__doc__)
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    _add_world(verbs.add_parser("world", help="draw scenes; write pictures, conversations and an exam"))
    return parser


def _add_world(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, help="the folder to make")
    parser.add_argument("--scenes", type=int, default=12000, help="training scenes (default %(default)s)")
    parser.add_argument("--held-out", type=int, default=500, help="scenes of the exam (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="what is drawn (default %(default)s)")
    parser.set_defaults(run=_world)


def _world(arguments: argparse.Namespace) -> int:
    from tools.toy.write import write_world

    write_world(arguments.out, arguments.scenes, arguments.held_out, arguments.seed)
    print(f"wrote {arguments.scenes} scenes and {arguments.held_out} held-out ones to {arguments.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
