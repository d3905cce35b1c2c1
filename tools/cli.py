"""The `sightline` command: `sightline VERB …` runs the `main` of one module, as `python -m MODULE …` does."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec

from models.common.errors import InputError, run_cli

VERBS = {
    "train": ("trainer.main", "train one stage of a recipe on this machine"),
    "shards": ("tools.shards.__main__", "make, index and check tar shards"),
    "convert": ("tools.convert.__main__", "GGUF or ONNX -> a model directory that a recipe can name"),
    "preflight": ("tools.preflight.__main__", "what a job would run into, before it is queued"),
    "merge": ("tools.export.merge", "checkpoint and base -> a bundle"),
    "bundle": ("tools.export.bundle", "checkpoint and base -> a small bundle in one go"),
    "export": ("tools.export.__main__", "run or bundle -> the format of another program"),
    "quantize": ("tools.export.quantize", "bundle -> a smaller bundle"),
    "eval": ("eval.run", "score a bundle"),
    "score": ("eval.score", "score answers that are there already"),
    "judge": ("eval.judge", "what a judge is asked about answers, and its verdicts"),
    "contamination": ("tools.inspect.contamination", "look for a suite's pictures in training data"),
    "compare": ("tools.inspect.compare", "compare evaluations sample by sample"),
    "serve": ("tools.serve.__main__", "an API over a bundle for many users at once"),
    "demo": ("tools.serve.demo", "a page to talk to a bundle, in front of the same API"),
    "audit": ("tools.inspect.audit", "prove from a run's ledger that no sample was lost or seen twice"),
    "ledger": ("tools.inspect.ledger", "print which draws each global batch was made of"),
    "replay": ("tools.inspect.replay", "compute one step of a run again, alone"),
    "versions": ("tools.inspect.versions", "what is installed, and the versions that work"),
    "chaos": ("tools.dev.chaos.__main__", "kill a small run again and again, and compare"),
    "report": ("tools.examples.report.__main__", "write a run's report again"),
    "toy": ("tools.examples.synthetic.__main__", "a synthetic world to learn, and tiny backbones"),
    "quickstart": ("tools.examples.quickstart.__main__", "the whole chain on the synthetic world"),
    "photos": ("tools.examples.photos.__main__", "the whole chain on your photos, with two pretrained backbones"),
}


def main() -> int:
    """Run the `sightline` command on the process's own arguments; its exit code."""
    return run_cli(dispatch)


def dispatch(argv: list[str]) -> int:
    """Run the verb that `argv` begins with on the arguments after it; without a verb, list the verbs.

    Returns:
        The verb's exit code; 2 where no verb was given.

    Raises:
        InputError: no such verb, or one that only a checkout has.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: sightline VERB ...\n")
        for verb, (module, purpose) in VERBS.items():
            if not _is_installed(module):
                continue
            print(f"  {verb:13s} {purpose} (python -m {module.removesuffix('.__main__')})")
        return 0 if argv else 2
    verb, *arguments = argv
    if verb not in VERBS:
        raise InputError(f"sightline {verb}: no such verb; there are {', '.join(VERBS)}")
    module = VERBS[verb][0]
    if not _is_installed(module):
        raise InputError(f"sightline {verb}: is not installed; a checkout of the project has it (python -m {module})")
    sys.argv[0] = f"sightline {verb}"
    return int(import_module(module).main(arguments))


def _is_installed(module: str) -> bool:
    """Whether this installation has it: examples and benchmarks are in a checkout only."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


if __name__ == "__main__":
    raise SystemExit(main())
