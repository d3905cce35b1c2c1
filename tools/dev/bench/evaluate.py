"""Answers per second of an evaluation: ours, and lmms-eval's llava_hf on the same bundle and questions; and scoring.

    python -m tools.bench.evaluate BUNDLE [--questions 64]      make bench-eval: the quickstart's bundle

The peer is lmms-eval's own class where lmms-eval is installed (`make lmms`); else the same calls of transformers that
it makes, one question at a time (it allows no larger batch). Both get the same images and questions as objects, so
that no reading of files counts, and their answers are compared. `eval.score` is measured as a command over 18,000
answers.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from models.common.errors import InputError, run_cli

if TYPE_CHECKING:
    from eval.predictor import Query

NUM_SCORED = 18_000
Answers = Callable[["Sequence[Query]"], list[str]]

_QUESTIONS = (
    "What is in the image?",
    "How many shapes are there, and which colour has the largest one?",
    "Describe it.",
)


def main(argv: list[str]) -> int:
    """Open both, run them in turns, and print the table and how many answers are equal."""
    parser = argparse.ArgumentParser(prog="tools.bench.evaluate", description="Answers a second of an evaluation.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=16, help="at most, as lmms-eval has it for short answers")
    parser.add_argument("--batch-size", type=int, default=32, help="ours")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args(argv)
    if min(arguments.questions, arguments.tokens, arguments.rounds, arguments.batch_size) < 1:
        raise InputError("--questions, --tokens, --rounds and --batch-size: at least 1 of each is needed")
    from eval.predictor import Decoding, Predictor
    from tools.dev.bench.measure import compare, report

    predictor = Predictor.open(arguments.bundle, device=arguments.device)
    decoding = Decoding(max_new_tokens=arguments.tokens, speculate="never")

    def ours(queries: Sequence[Query]) -> list[str]:
        return predictor.answer(queries, decoding, batch_size=arguments.batch_size)

    name, peer = _peer(arguments.bundle, arguments.device, arguments.tokens)
    asked = questions(arguments.questions)
    equal = sum(one.strip() == other.strip() for one, other in zip(ours(asked), peer(asked), strict=True))
    print(f"the peer is {name}; {equal} of {len(asked)} answers are equal")
    rates = [_rate(work, asked) for work in (ours, peer)]
    packages = ["torch", "transformers"]
    report("evaluate", [compare("answers/s", "answers/s", *rates, rounds=arguments.rounds, packages=packages)])
    print(f"eval.score of {NUM_SCORED} answers: {scoring_s(NUM_SCORED):.2f} s of CPU time, its start included")
    return 0


def scoring_s(count: int) -> float:
    """Seconds of CPU time that `eval.score` takes as a command, of answers to yes/no questions, six about an image."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "answers.jsonl"
        with file.open("w", encoding="utf-8") as stream:
            for place in range(count):
                said, label = ("Yes", "No", "Yes")[place % 3], ("yes", "no")[place % 2]
                entry = {"question_id": place, "category": "random", "image": f"{place // 6}.jpg"}
                stream.write(json.dumps({**entry, "label": label, "prediction": said}) + "\n")
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        words = ["pope", "--predictions", str(file), "--out", str(Path(folder) / "out.json")]
        subprocess.run([sys.executable, "-m", "eval.score", *words], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def questions(count: int) -> list[Query]:
    """Questions of several lengths about drawn images."""
    from eval.predictor import Query, Turn
    from tools.export.golden import drawn

    images = [probe.image for probe in drawn(min(count, 8))]
    return [
        Query((images[place % len(images)],), (Turn("user", _QUESTIONS[place % len(_QUESTIONS)]),))
        for place in range(count)
    ]


def _rate(work: Answers, asked: Sequence[Query]) -> Callable[[], float]:
    """Answers by second of the process's own time on all its cores, which other processes disturb least."""

    def rate() -> float:
        start_s = time.process_time()
        work(asked)
        return len(asked) / (time.process_time() - start_s)

    return rate


def _peer(bundle: Path, device: str, num_tokens: int) -> tuple[str, Answers]:
    if find_spec("lmms_eval") is None:
        name = "transformers as llava_hf calls it (lmms-eval is not installed)"
        return name, _like_llava_hf(bundle, device, num_tokens)
    try:
        from lmms_eval.models.chat.llava_hf import LlavaHf
    except ImportError as error:
        raise InputError(f"lmms-eval's llava_hf can't be loaded: {error}; `make lmms` makes an environment") from None
    model: Any = LlavaHf(pretrained=str(bundle), device=device, device_map=device, batch_size=1)
    options = {"max_new_tokens": num_tokens, "temperature": 0, "do_sample": False, "num_beams": 1, "until": ["\n\n"]}

    def answers(queries: Sequence[Query]) -> list[str]:
        model.task_dict = {"bench": {"test": list(queries)}}
        requests = [
            SimpleNamespace(args=("", _messages, dict(options), place, "bench", "test"))
            for place in range(len(queries))
        ]
        return [getattr(found, "text", found) for found in model.generate_until(requests)]

    return "lmms-eval's llava_hf", answers


def _messages(query: Query) -> list[dict[str, Any]]:
    content = [*({"type": "image", "url": image} for image in query.images), _text(query)]
    return [{"role": "user", "content": content}]


def _text(query: Query) -> dict[str, str]:
    return {"type": "text", "text": query.turns[0].text}


def _like_llava_hf(bundle: Path, device: str, num_tokens: int) -> Answers:
    import torch

    from models.opening import open_model, open_processor

    model, processor = open_model(bundle, torch.device(device)), open_processor(bundle)

    @torch.no_grad()
    def answers(queries: Sequence[Query]) -> list[str]:
        found = []
        for query in queries:
            content = [*({"type": "image"} for _ in query.images), _text(query)]
            text = processor.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
            inputs = processor(images=list(query.images), text=text, return_tensors="pt").to(device, model.dtype)
            ids = model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=num_tokens, use_cache=True)
            found.append(processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0])
        return found

    return answers


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
