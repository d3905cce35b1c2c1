"""Benchmarks that a judge scores: what to ask it, and its replies as verdicts that `eval.score` reads. Asks no judge.

    eval.run --task benchmark --benchmark mmvet ... --out OUT.json
    sightline judge export OUT.json --out requests.jsonl         {"id", "prompt", "question", "reference", "answer"}
    any judge of yours, once or several times                    {"id", "reply"} a line
    sightline judge import requests.jsonl --replies R1.jsonl R2.jsonl --out verdicts.jsonl
    sightline score mmvet --predictions verdicts.jsonl --judge NAME

Published figures need the benchmark's own prompt: `--template` takes a copy of it, in which {question}, {reference} and
{answer} are filled in. Without one the judge is asked in words of this project's own.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.entries import read_json
from eval.results import read_samples
from models.common.documents import read_value
from models.common.errors import InputError, run_cli
from models.common.files import write_text

_NUMBER = r"(\d+(?:\.\d+)?)"
_KEPT = ("capability", "category")
_BRACES = re.compile(r"\{(question|reference|answer)\}")


@dataclass(frozen=True)
class Judging:
    """How one benchmark is judged: the words without a template, the fields of a verdict, and reading a reply."""

    words: str
    id_field: str
    read: Callable[[str], Any]

    def verdicts(self, request: Mapping[str, Any], replies: Sequence[str]) -> list[dict[str, Any]]:
        """The entries that `eval.score` reads."""
        kept = {name: request[name] for name in _KEPT if name in request}
        found = [self.read(reply) for reply in replies]
        if self.id_field == "id":
            return [{"id": request["id"], "prediction": request["answer"], "scores": found, **kept}]
        return [
            {"run": run, self.id_field: request["id"], "tuple": pair, **kept} for run, pair in enumerate(found, start=1)
        ]


def _share(reply: str) -> float:
    found = re.search(_NUMBER, reply)
    if found is None or float(found.group(1)) > 1:
        raise InputError(f"{reply[:60]!r}: a number from 0 to 1 expected")
    return float(found.group(1))


def _pair(reply: str) -> list[float]:
    found = re.match(rf"\s*{_NUMBER}[\s,]+{_NUMBER}\b", reply)
    if found is None:
        raise InputError(f"{reply[:60]!r}: two numbers expected at its beginning, the reference's and the model's")
    return [float(number) for number in found.groups()]


JUDGED = {
    "mmvet": Judging(
        "How right is the answer to this question about an image, beside the reference? <AND> joins what must all be"
        " said, <OR> what may be said instead. Reply with one number alone, from 0.0 (wrong) to 1.0 (right)."
        "\n\nQuestion: {question}\nReference: {reference}\nAnswer: {answer}\n",
        "id",
        _share,
    ),
    "llava_bench": Judging(
        "Two assistants have answered a question about an image. Rate from 1 to 10 how helpful, relevant, exact and"
        " detailed each answer is. Reply with the two numbers in the first line, first the first assistant's, with a"
        " blank between, then with your reasons.\n\nQuestion: {question}\n\nFirst assistant: {reference}\n\n"
        "Second assistant: {answer}\n",
        "question_id",
        _pair,
    ),
}


def main(argv: list[str]) -> int:
    """Export or import."""
    arguments = _parser().parse_args(argv)
    if arguments.verb == "export":
        requests = export(arguments.evaluation, arguments.references, arguments.template)
        _write(arguments.out, requests)
        print(f"{len(requests)} requests to a judge written to {arguments.out}")
        return 0
    verdicts = import_replies(arguments.requests, arguments.replies)
    _write(arguments.out, verdicts)
    print(f"{len(verdicts)} verdicts written to {arguments.out}")
    return 0


def export(evaluation: Path, references: Path | None = None, template: Path | None = None) -> list[dict[str, Any]]:
    """A request for each answer of an evaluation.

    Args:
        references: answers to compare with, where the benchmark's questions have none: {question_id, text} a line.
        template: the prompt, with {question}, {reference} and {answer}.

    Raises:
        InputError: no single judged benchmark in it, a question without a reference, or a template without {answer}.
    """
    results = [each for each in read_value(evaluation)["results"] if each.get("benchmark") in JUDGED]
    if len(results) != 1:
        raise InputError(f"{evaluation} has {len(results)} results of {', '.join(JUDGED)}; one is needed")
    name = results[0]["benchmark"]
    words = JUDGED[name].words if template is None else template.read_text(encoding="utf-8")
    if "{answer}" not in words:
        raise InputError(f"{template}: {{answer}} does not stand in it, nor is it known where the answer goes")
    known = {} if references is None else _by_id(references, ("text", "answer"))
    found = []
    for sample in read_samples(evaluation.with_name(results[0]["samples"])):
        identity = sample["id"].rpartition("/")[2]
        reference = known.get(identity, sample["truth"])
        if reference is None:
            raise InputError(f"question {identity} has no reference answer: give --references")
        texts = {"question": sample["question"], "reference": str(reference), "answer": sample["answer"]}
        prompt = _BRACES.sub(lambda match, texts=texts: texts[match.group(1)], words)  # type: ignore[misc]
        kept = {key: sample["row"][key] for key in _KEPT if key in sample["row"]}
        found.append({"benchmark": name, "id": identity, "prompt": prompt, **texts, **kept})
    return found


def import_replies(requests: Path, replies: Sequence[Path]) -> list[dict[str, Any]]:
    """The verdicts of one or several runs of a judge, one file each.

    Raises:
        InputError: a request without a reply, or a reply without a verdict.
    """
    asked = _lines(requests)
    runs = [_by_id(path, ("reply", "content", "text")) for path in replies]
    found: list[dict[str, Any]] = []
    for request in asked:
        missing = next((path for path, run in zip(replies, runs, strict=True) if request["id"] not in run), None)
        if missing is not None:
            raise InputError(f"{missing} has no reply about {request['id']}")
        try:
            found += JUDGED[request["benchmark"]].verdicts(request, [str(run[request["id"]]) for run in runs])
        except InputError as error:
            raise InputError(f"the reply about {request['id']}: {error}") from None
    return found


def _by_id(path: Path, names: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for entry in _lines(path):
        identity = str(entry.get("id", entry.get("question_id", "")))
        value = next((entry[name] for name in names if name in entry), None)
        if not identity or value is None or identity in found:
            raise InputError(f"{path}: an id of its own and {' or '.join(names)} are needed: {json.dumps(entry)[:80]}")
        found[identity] = value
    return found


def _lines(path: Path) -> list[dict[str, Any]]:
    value, _ = read_json(path)
    entries = value if isinstance(value, list) else [value]
    if not all(isinstance(entry, dict) for entry in entries):
        raise InputError(f"{path}: an entry a line expected")
    return entries


def _write(path: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sightline judge", description="What a judge is asked, and what it says.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    export_ = verbs.add_parser("export", help="requests to a judge, of an evaluation's answers")
    export_.add_argument("evaluation", type=Path, help="OUT.json of eval.run")
    export_.add_argument("--references", type=Path, metavar="FILE", help="LLaVA-Bench: its answers_gpt4.jsonl")
    export_.add_argument("--template", type=Path, metavar="FILE", help="the prompt, with {question} … in it")
    import_ = verbs.add_parser("import", help="replies as verdicts")
    import_.add_argument("requests", type=Path, help="what export wrote")
    import_.add_argument("--replies", nargs="+", type=Path, required=True, metavar="FILE", help="one file a run")
    for each in (export_, import_):
        each.add_argument("--out", type=Path, required=True)
    return parser


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
