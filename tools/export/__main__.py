"""`sightline export SOURCE OUT --to FORMAT`: a run or a bundle in the format of another program.

    run ----> adapter                       what LoRA learnt, over the base
    run --merge--> bundle --> stock, ...    the whole model

Owns the command line. Formats are in `tools.export.formats`; `sightline merge` and `sightline quantize` make bundles.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from models.common.errors import InputError, run_cli
from tools.export.arguments import add_golden, add_out, golden_set, out_of, writing
from tools.export.formats import FORMATS, ExportOptions, export_to
from tools.export.merge import add_source, find_source, merge


def main(argv: list[str]) -> int:
    """Export and report; returns 0 if OUT is written and passes its parity check."""
    arguments = _parse(argv)
    out = out_of(arguments)
    if out.exists():
        raise InputError(f"{out}: is there already; name another directory, or remove it")
    if arguments.budget is not None and not arguments.budget > 0:
        raise InputError(f"--budget {arguments.budget}: give a share of the logits' spread above 0, such as 0.1")
    options = ExportOptions.of(arguments, golden_set(arguments))
    with writing(out):
        if FORMATS[arguments.to].takes == "run":
            line = export_to(arguments.to, find_source(_a_run(arguments)), out, options)
        else:
            with _bundle(arguments, out, options) as bundle:
                line = export_to(arguments.to, bundle, out, options)
    print(f"{out}: {line}")
    return 0


def _a_run(arguments: argparse.Namespace) -> argparse.Namespace:
    if (arguments.run / "sightline.json").is_file():
        raise InputError(
            f"{arguments.run}: a bundle, in which the adapter is merged already; give the run that it was made from"
        )
    return arguments


@contextmanager
def _bundle(arguments: argparse.Namespace, out: Path, options: ExportOptions) -> Iterator[Path]:
    """The bundle that a command line names; a run is merged, and its bundle is removed when the block ends."""
    from tools.export.bundle import hidden_beside

    if (arguments.run / "sightline.json").is_file():
        yield arguments.run
        return
    with hidden_beside(out) as merged:
        probes = list(options.probes)
        yield merge(find_source(arguments), merged, probes=probes, force=options.force, memory_gb=options.memory_gb)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="sightline export",
        description="Write a run or a bundle in the format of another program.",
        epilog="formats: " + "; ".join(f"{name}: {each.purpose}" for name, each in FORMATS.items()),
    )
    add_source(parser)
    add_out(parser)
    parser.add_argument("--to", choices=tuple(FORMATS), required=True, help="the format")
    parser.add_argument("--base", type=Path, metavar="DIR", help="adapter: write its base, a whole model, to DIR too")
    parser.add_argument("--licence", default="other", help="for the model card: the hub's name of your licence")
    parser.add_argument("--figures", type=Path, metavar="FILE", help="for the model card: what eval.run wrote (.json)")
    parser.add_argument("--budget", type=float, help="largest relative logit difference of a quantized format")
    add_golden(parser)
    parser.add_argument("--force", action="store_true", help="write it even if its parity fails")
    return parser.parse_intermixed_args(argv)


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
