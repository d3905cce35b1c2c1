"""Checkpoint -> a small bundle in one go: `python -m tools.bundle RUN OUT --to nf4` merges, quantizes and compares.

The merged weights lie beside OUT under a hidden name meanwhile and go with the command; `--keep-merged DIR` keeps them.
Both comparisons must hold: merged against trained, quantized against merged.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from models.errors import run_cli
from tools.bundles.words import add_out, out_of, writing
from tools.merge import add_source, find_source, merge
from tools.quantize import add_options, options_of, quantize


def main(argv: list[str]) -> int:
    """Merge, quantize and report; 0 when the bundle is there and both parities hold."""
    parser = argparse.ArgumentParser(prog="tools.bundle", description="Merge and quantize a checkpoint.")
    add_source(parser)
    add_out(parser)
    add_options(parser)
    parser.add_argument("--keep-merged", type=Path, metavar="DIR", help="write the whole bundle too")
    arguments = parser.parse_intermixed_args(argv)
    out, options, source = out_of(arguments), options_of(arguments), find_source(arguments)
    with writing(out), ExitStack() as stack:
        merged: Path = arguments.keep_merged or stack.enter_context(_passing(out))
        merge(source, merged, probes=list(options.probes), force=options.force)
        quantize(merged, out, options, parent="the merged bundle")
    print(f"{out}: {source.recipe.name}/{source.stage}, open it with: sightline demo {out}")
    return 0


@contextmanager
def _passing(out: Path) -> Iterator[Path]:
    """A hidden sibling of `out` that goes when the block ends."""
    passing = out.with_name(f".{out.name}.merged")
    try:
        yield passing
    finally:
        shutil.rmtree(passing, ignore_errors=True)


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
