"""The `sightline` command: `sightline VERB …` is `python -m MODULE …`."""

from __future__ import annotations

import sys
from importlib import import_module

from models.errors import InputError, run_cli

VERBS = {
    "train": ("trainer.main", "train one stage of a recipe on this machine"),
    "shards": ("tools.shards.__main__", "make, index and check tar shards"),
    "preflight": ("tools.preflight.__main__", "what a job would run into, before it is queued"),
    "merge": ("tools.merge", "checkpoint and base -> a bundle"),
    "bundle": ("tools.bundle", "checkpoint and base -> a small bundle in one go"),
    "quantize": ("tools.quantize", "bundle -> a smaller bundle"),
    "eval": ("eval.run", "score a bundle"),
    "demo": ("tools.demo.__main__", "a page to talk to a bundle"),
    "audit": ("tools.audit", "prove from a run's ledger that no sample was lost or seen twice"),
    "replay": ("tools.replay", "compute one step of a run again, alone"),
    "chaos": ("tools.chaos.__main__", "kill a small run again and again, and compare"),
    "report": ("tools.report.__main__", "write a run's report again"),
    "toy": ("tools.toy.__main__", "a small world to learn, and tiny backbones"),
    "quickstart": ("tools.quickstart.__main__", "the whole chain on the small world"),
}


def main() -> int:
    """Entry point of the console command."""
    return run_cli(_dispatch)


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: sightline VERB ...\n")
        for verb, (module, purpose) in VERBS.items():
            print(f"  {verb:11s} {purpose} ({module})")
        return 0 if argv else 2
    verb, *rest = argv
    if verb not in VERBS:
        raise InputError(f"sightline {verb}: no such verb; there are {', '.join(VERBS)}")
    sys.argv[0] = f"sightline {verb}"
    return int(import_module(VERBS[verb][0]).main(rest))
