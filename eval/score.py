"""Score answers that are there already: `python -m eval.score BENCHMARK --predictions FILE --out OUT.json`.

Owns: the command line. Asks nothing and loads no torch. How the answers were asked is unknown, so the result's protocol
is no other's, unless OUT.json of our own evaluation is given: then it is that evaluation's.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.common.documents import parse
from models.common.errors import InputError, run_cli

if TYPE_CHECKING:
    from eval.benchmarks.spec import Benchmark
    from eval.result import TaskResult

_EPILOG = """\
FILE is LLaVA's JSONL, lmms-eval's samples, VLMEvalKit's table (xlsx, TSV, CSV), a COCO, DocVQA or MM-Vet submission,
or an evaluation of ours (OUT.json, or one OUT.NAME.jsonl). Entries that hold the truth as well need no --questions.
"""


@dataclass(frozen=True)
class Sources:
    """Where answers and truths are; `questions` may be empty where predictions hold the truth."""

    predictions: tuple[str, ...]
    questions: tuple[str, ...] = ()
    annotations: str | None = None
    answer: str | None = None
    """A field of the predictions, where their answer has another name."""


def main(argv: list[str]) -> int:
    """Read, score, write, print."""
    from eval.benchmarks.spec import names
    from eval.results import check_out, table, write_lmms_eval, write_results, write_samples

    arguments = _parser(names()).parse_args(argv)
    check_out(arguments.out)
    started_s = time.perf_counter()
    sources = Sources(tuple(arguments.predictions), tuple(arguments.questions), arguments.annotations, arguments.answer)
    result = score(arguments.benchmark, sources, seed=arguments.seed, judge=arguments.judge)
    path = write_samples(arguments.out, result.name, result.samples)
    evaluation = {
        "model": arguments.model,
        "seconds": round(time.perf_counter() - started_s, 3),
        "results": [{**result.as_dict(), "samples": path.name}],
    }
    write_results(arguments.out, evaluation)
    if arguments.lmms_eval is not None:
        write_lmms_eval(arguments.lmms_eval, evaluation, arguments.out)
    print(table(evaluation["results"]))
    print(f"written to {arguments.out}")
    return 0


def score(name: str, sources: Sources, *, seed: int = 0, judge: str | None = None) -> TaskResult:
    """The result of the predictions.

    Raises:
        InputError: a file is missing or of none of the forms, or an answer is missing, doubled or to no question.
    """
    from eval.benchmarks.scoring import score_answers
    from eval.benchmarks.spec import load

    benchmark = load(name)
    if sources.answer is not None:
        benchmark = benchmark.model_copy(update={"answer": sources.answer})
    if benchmark.is_judged and judge is not None:
        benchmark = benchmark.model_copy(update={"title": f"{benchmark.title}, judged by {judge}"})
    asked, files = _own(name, sources.predictions)
    rows, answers = _rows_and_answers(benchmark, Sources(files, *_rest(sources)))
    facts = None if asked is None and judge is None else {**(asked or {}), **({"judge": judge} if judge else {})}
    return score_answers(name, benchmark, rows, answers, asked=facts, seed=seed)


def _rest(sources: Sources) -> tuple[tuple[str, ...], str | None, str | None]:
    return sources.questions, sources.annotations, sources.answer


def _own(name: str, files: tuple[str, ...]) -> tuple[Mapping[str, Any] | None, tuple[str, ...]]:
    """How an evaluation of ours asked, and its samples, where its OUT.json is given; other files as they are."""
    if len(files) != 1 or not files[0].endswith(".json"):
        return None, files
    path = Path(files[0])
    try:
        value = parse(path.read_bytes(), path)
    except (OSError, InputError):
        return None, files
    results = value.get("results") if isinstance(value, dict) else None
    if not isinstance(results, list) or not all(isinstance(each, dict) for each in results):
        return None, files
    found = [each for each in results if each.get("benchmark") == name]
    if len(found) != 1:
        raise InputError(f"{path} has {len(found)} results of {name}; one is needed")
    asked = found[0]["protocol_facts"]["asked"]
    return (None if asked == "elsewhere" else asked), (str(path.with_name(found[0]["samples"])),)


def _rows_and_answers(benchmark: Benchmark, sources: Sources) -> tuple[Any, list[str]]:
    from eval.benchmarks.fields import find
    from eval.benchmarks.rows import read_rows, rows_of
    from eval.predictions import ALONE, ASKED, answer_in, answers_to, read_predictions

    where = " and ".join(sources.predictions)
    entries: list[dict[str, Any]] = []
    digests: dict[str, str] = {}
    for file in sources.predictions:
        found, digests[Path(file).name] = read_predictions(file, benchmark)
        entries += found
    if sources.questions:
        rows = read_rows(benchmark, sources.questions, sources.annotations)
        return rows, answers_to(rows.rows, entries, benchmark, where)
    if any(ASKED in entry for entry in entries):
        raise InputError(f"{where} holds no questions: give the benchmark's own files with --questions")
    if entries and not benchmark.is_judged and all(find(entry, benchmark.truth_source) is None for entry in entries):
        raise InputError(
            f"{where} holds no right answers ({' or '.join(benchmark.truth_source.split('|'))}): "
            "give the benchmark's own files with --questions"
        )
    rows = rows_of(benchmark, entries, where, {})
    return rows, [answer_in(dict(row.fields), benchmark, ALONE, where) for row in rows.rows]


def _parser(names: tuple[str, ...]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m eval.score",
        description="Score answers that are there already.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("benchmark", help=", ".join(names))
    add("--predictions", nargs="+", required=True, metavar="FILE")
    add("--questions", nargs="+", default=[], metavar="FILE", help="the benchmark's own files")
    add("--annotations", metavar="FILE", help="its answers, where they are in a file of their own")
    add("--answer", metavar="FIELD", help="where the predictions have their answer under another name")
    add("--model", default="elsewhere", help="what gave the answers, for the result")
    add("--judge", help="what gave the verdicts; a part of the protocol")
    add("--seed", type=int, default=0, help="of the intervals")
    add("--out", type=Path, required=True, help="the JSON file to write")
    add("--lmms-eval", type=Path, metavar="FOLDER", help="also write results and samples as lmms-eval does")
    return parser


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
