"""What the engine costs in a process: many callers at once, and one, beside the library without it.

    python -m tools.bench.engine BUNDLE [--clients 16]      make bench-engine: the quickstart's merged model

| figure | ours | peer |
|---|---|---|
| callers at once | answers a CPU-second, each caller a thread with one question at a time | `answer` in batches |
| one caller | the same with one thread | `stream`, one after another |
| first token | 1 / seconds to it, of one caller | the same of `stream` |

CPU-seconds are the process's own, on all its cores, which other processes disturb least.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from models.common.errors import InputError, run_cli

if TYPE_CHECKING:
    from eval.engine import Engine
    from eval.predictor import AnswerStream, Decoding, Query


def main(argv: list[str]) -> int:
    """Measure in turns, print the table and how many answers are equal."""
    parser = argparse.ArgumentParser(prog="tools.bench.engine", description="What the engine costs in a process.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--clients", type=int, default=16, help="callers at once, and rows of a batch")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args(argv)
    if min(arguments.questions, arguments.tokens, arguments.clients, arguments.rounds) < 1:
        raise InputError("--questions, --tokens, --clients and --rounds: at least 1 of each is needed")
    from eval.engine import Engine, EngineLimits
    from eval.predictor import Decoding, Predictor
    from tools.dev.bench.evaluate import questions
    from tools.dev.bench.measure import compare, report

    predictor = Predictor.open(arguments.bundle, device=arguments.device)
    decoding, asked = Decoding(max_new_tokens=arguments.tokens, speculate="never"), questions(arguments.questions)
    # Without memories on either side: what is compared is the same work.
    limits = EngineLimits(rows=arguments.clients, waiting=arguments.clients, feature_bytes=0, chat_bytes=0)
    alone = Predictor(predictor.model, predictor.processor, device=predictor.device, is_fixed=predictor.is_fixed)
    engine = Engine(alone, limits).start()
    try:
        found = ask(engine, asked, decoding, arguments.clients)
        equal = sum(one == other for one, other in zip(found, alone.answer(asked, decoding), strict=True))
        print(f"{equal} of {len(asked)} answers are equal")
        pairs = {
            f"{arguments.clients} callers / batches of {arguments.clients}": (
                _rate(lambda: ask(engine, asked, decoding, arguments.clients), len(asked)),
                _rate(lambda: alone.answer(asked, decoding, batch_size=arguments.clients), len(asked)),
            ),
            "1 caller / stream": (
                _rate(lambda: ask(engine, asked, decoding, 1), len(asked)),
                _rate(lambda: ["".join(alone.stream(query, decoding)) for query in asked], len(asked)),
            ),
            "first token, 1 caller / stream": (
                _first(lambda query: engine.stream(query, decoding), asked),
                _first(lambda query: alone.stream(query, decoding), asked),
            ),
        }
        rows = [
            compare(what, "1/s", *pair, rounds=arguments.rounds, packages=["torch", "transformers"])
            for what, pair in pairs.items()
        ]
    finally:
        engine.close()
    print(f"rows a step {engine.stats().rows_per_step:.1f}, padding {engine.stats().padding_share:.0%}")
    report("engine", rows)
    return 0


def ask(engine: Engine, asked: Sequence[Query], decoding: Decoding, num_clients: int) -> list[str]:
    """The answers, asked by so many threads, each its next question after an answer."""
    answers = [""] * len(asked)

    def client(first: int) -> None:
        for place in range(first, len(asked), num_clients):
            answers[place] = "".join(engine.stream(asked[place], decoding))

    with ThreadPoolExecutor(num_clients) as threads:
        list(threads.map(client, range(num_clients)))
    return answers


def _rate(work: Callable[[], object], count: int) -> Callable[[], float]:
    def rate() -> float:
        start_s = time.process_time()
        work()
        return count / (time.process_time() - start_s)

    return rate


def _first(stream: Callable[[Query], AnswerStream], asked: Sequence[Query]) -> Callable[[], float]:
    """One over the median of the seconds to the first token."""

    def rate() -> float:
        seconds = []
        for query in asked:
            answer = stream(query)
            "".join(answer)
            seconds.append(answer.first_token_s or 0.0)
        return 1 / statistics.median(seconds)

    return rate


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
