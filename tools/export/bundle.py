"""Checkpoint -> a small bundle in one go: `python -m tools.bundle RUN OUT --to nf4` merges, quantizes and compares.

The merged weights are stored next to OUT under a hidden name and removed at the end; `--keep-merged DIR` keeps them.
Both comparisons must hold: merged against trained, quantized against merged.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from models.common.errors import run_cli
from tools.export.arguments import add_out, out_of, writing
from tools.export.merge import add_source, find_source, merge
from tools.export.quantize import add_options, options_of, quantize


def main(argv: list[str]) -> int:
    """Merge, quantize and report; returns 0 if the bundle is written and passes both parity checks."""
    parser = argparse.ArgumentParser(prog="tools.bundle", description="Merge and quantize a checkpoint.")
    add_source(parser)
    add_out(parser)
    add_options(parser)
    parser.add_argument("--keep-merged", type=Path, metavar="DIR", help="write the whole bundle too")
    arguments = parser.parse_intermixed_args(argv)
    out, options, source = out_of(arguments), options_of(arguments), find_source(arguments)
    with writing(out), ExitStack() as stack:
        merged: Path = arguments.keep_merged or stack.enter_context(hidden_beside(out))
        merge(source, merged, probes=list(options.probes), force=options.force, memory_gb=options.memory_gb)
        quantize(merged, out, options, parent="the merged bundle")
    print(f"{out}: {source.recipe.name}/{source.stage}, open it with: sightline demo {out}")
    return 0


@contextmanager
def hidden_beside(out: Path) -> Iterator[Path]:
    """The path of a hidden sibling of `out`, which is removed when the block ends."""
    hidden = out.with_name(f".{out.name}.merged")
    try:
        yield hidden
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
