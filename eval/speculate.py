"""The speed-up of speculative decoding: `python -m eval.speculate BUNDLE --images DIR --prompt "Describe the image."`.

Each image's answer is decoded greedily, with speculation in every step, and with speculation while it is faster; the
tokens must be the same. Owns the comparison and its report. Does not own the decoding (`eval.speculative`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from models.common.documents import parse
from models.common.errors import InputError, run_cli
from models.common.files import write_json

if TYPE_CHECKING:
    from eval.predictor import Predictor, Query
    from eval.speculative import SpeculationGate


def main(argv: list[str]) -> int:
    """Measure and report; 0 where every token was the same."""
    arguments = _parse(argv)
    from eval.predictor import Predictor

    predictor = Predictor.open(arguments.bundle, device=arguments.device)
    queries = _queries(arguments)
    report = measure(predictor, queries, arguments.max_new_tokens)
    for name, value in report.items():
        print(f"{name:28}{_shown(value)}")
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(arguments.out, report)
        print(f"written to {arguments.out}")
    return 0 if report["identical"] else 1


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m eval.speculate", description=__doc__)
    parser.add_argument("bundle", type=Path, help="a bundle whose model has heads for future tokens")
    parser.add_argument("--images", type=Path, required=True, help="a folder of images")
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument("--prompt", default="Describe the image.", help="asked of each (default: %(default)s)")
    asked.add_argument("--questions", type=Path, help="or the questions of a file in VQA v2's format")
    parser.add_argument("--limit", type=int, default=100, help="how many are asked (default %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="of an answer (default %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default %(default)s)")
    parser.add_argument("--out", type=Path, help="the figures as JSON")
    return parser.parse_args(argv)


def _queries(arguments: argparse.Namespace) -> list[Query]:
    from data_pipeline.images import open_image
    from eval.predictor import Query, Turn

    images: Path = arguments.images
    if not images.is_dir():
        raise InputError(f"--images {images}: no such directory")
    asked = _questions(arguments) if arguments.questions is not None else _prompts(arguments)
    return [Query((open_image(file),), (Turn("user", text),)) for file, text in asked]


def _prompts(arguments: argparse.Namespace) -> list[tuple[Path, str]]:
    from data_pipeline.images import IMAGE_EXTENSIONS

    found = sorted(arguments.images.iterdir())
    files = [file for file in found if file.suffix[1:].lower() in IMAGE_EXTENSIONS][: arguments.limit]
    if not files:
        raise InputError(f"--images {arguments.images}: no image in it")
    return [(file, arguments.prompt) for file in files]


def _questions(arguments: argparse.Namespace) -> list[tuple[Path, str]]:
    from eval.images import find_images

    file: Path = arguments.questions
    try:
        asked = parse(file.read_bytes(), file)["questions"][: arguments.limit]
        texts, ids = [str(each["question"]) for each in asked], [(each["image_id"], None) for each in asked]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--questions {file}: no questions in VQA v2's format ({error})") from error
    return list(zip(find_images(arguments.images, ids), texts, strict=True))


def measure(predictor: Predictor, queries: Sequence[Query], max_new_tokens: int) -> dict[str, Any]:
    """The figures over all queries, one at a time. Forwards over prompts are not counted.

    Raises InputError where the model has no heads.
    """
    from tqdm import tqdm

    from eval.speculative import Speculation, SpeculationGate

    if predictor.speculation is None:
        raise InputError("the bundle's model has no heads for future tokens (model.future of its recipe)")
    always, auto = Speculation(), Speculation()
    seconds = {"greedy": 0.0, "always": 0.0, "auto": 0.0}
    num_tokens, num_same = 0, 0
    for query in tqdm(queries, desc="speculate", unit="answer", disable=not sys.stderr.isatty()):
        found = {}
        for name, counts, gate in (
            ("greedy", None, None),
            ("always", always, SpeculationGate(clock=None)),
            ("auto", auto, SpeculationGate()),
        ):
            started_s = perf_counter()
            found[name] = _tokens(predictor, query, max_new_tokens, counts, gate)
            seconds[name] += perf_counter() - started_s
        num_same += found["greedy"] == found["always"] == found["auto"]
        num_tokens += len(found["greedy"])
    num_steps = num_tokens - len(queries)  # of greedy decoding: the first token comes with the prompt
    return {
        "identical": num_same == len(queries),
        "prompts": len(queries),
        "tokens": num_tokens,
        "tokens_per_forward": num_steps / max(1, always.num_forwards),
        "forwards_per_token": {"greedy": 1.0, "always": always.num_forwards / max(1, num_steps)},
        "acceptance_by_head": always.acceptance,
        "seconds": seconds,
        "tokens_per_forward_auto": num_steps / max(1, auto.num_forwards),
        "switched_off_in_answers": auto.num_switched_off,
    }


def _tokens(
    predictor: Predictor, query: Query, max_new_tokens: int, counts: Any | None, gate: SpeculationGate | None
) -> list[int]:
    """An answer's ids up to its end token, decoded greedily or, with `counts`, speculatively."""
    from eval.generation import write_greedily
    from eval.kv_cache import DynamicKVCache
    from eval.speculative import write_speculatively

    inputs, ends = predictor.inputs_of(query), predictor.end_ids
    if counts is None:
        steps = write_greedily(predictor.model, inputs, DynamicKVCache(predictor.model), max_new_tokens)
    else:
        steps = write_speculatively(predictor.model, inputs, counts, gate)
    ids: list[int] = []
    for (token_id,) in islice(steps, max_new_tokens):
        ids.append(token_id)
        if token_id in ends:
            break
    steps.close()
    return ids


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(each)}" for name, each in value.items())
    if isinstance(value, list):
        return ", ".join(_shown(each) for each in value)
    return f"{value:.3f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
