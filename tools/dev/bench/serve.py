"""What serving costs: `sightline serve` beside the library in this process, and beside another server.

    python -m tools.bench.serve BUNDLE      make bench-serve: the quickstart's merged model

| figure | ours | peer |
|---|---|---|
| 16 clients | answers a CPU-second of the server | `Predictor.answer` in batches of 16 |
| 16 clients, new pictures | the same, about pictures that the server has not seen | the same |
| 1 client | the same | `Predictor.stream`, one after another |
| 16 clients over 1 | the same | 1 client of the same server |
| 16 clients over another server | answers a second | that of --peer |
| waiting | seconds that 95 % of 16 clients' questions take at most | the median of --peer |
| /health under load | the slowest, while three pictures of 54 megapixels are decoded | 0.25 s |
| memory | the most beyond the idle server's, under 32 pictures of 12 megapixels | the budget |

Two cores: the server has one, its clients the other. The library works on the server's core, which is then idle: cores
of a shared machine differ by a tenth in the same minute. Every ratio comes from one run, in turns.
"""

from __future__ import annotations

import argparse
import io
import math
import os
import shlex
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from models.common.errors import InputError, run_cli

if TYPE_CHECKING:
    from eval.predictor import Predictor, Query
    from tools.dev.bench.measure import Row
    from tools.dev.bench.serving import Server

PACKAGES = ("torch", "transformers", "fastapi", "uvicorn")
MANY = 16
HEALTH_S = 0.25
PICTURE_GB = 1.0
_LARGE, _PHOTO = (9000, 6000), (4000, 3000)
_NOISY_ROWS = 1500
"""Of a large picture, so that its file has 41 MB: reading its base64 is a part of what others could wait for."""


def main(argv: list[str]) -> int:
    """Measure, print the table, and say which answers were equal."""
    parser = argparse.ArgumentParser(prog="tools.bench.serve", description="What serving costs.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--photos", type=int, default=32, help="large pictures at once, for the memory")
    parser.add_argument("--peer", metavar="COMMAND", help="another server's command, with PORT where its port goes")
    parser.add_argument("--peer-model", default="", help="the model's name for it (default: the bundle's path)")
    arguments = parser.parse_args(argv)
    if min(arguments.questions, arguments.tokens, arguments.rounds, arguments.photos) < 1:
        raise InputError("--questions, --tokens, --rounds and --photos: at least 1 of each is needed")
    from tools.dev.bench.measure import report
    from tools.dev.bench.serving import our_command, serving
    from trainer.distributed.ports import choose_port

    ours, theirs = _cores()
    os.sched_setaffinity(0, theirs)
    folder = Path("runs/bench")
    folder.mkdir(parents=True, exist_ok=True)
    port = choose_port()
    more = ("--max-megapixels", "60", "--picture-gb", str(PICTURE_GB), "--name", "bench")
    with serving(our_command(arguments.bundle, port, *more), port, ours, folder / "serve.log") as server:
        rows = _rates(arguments, server, ours) + _peer(arguments, server, ours, folder) + _load(arguments, server)
    report("serve", rows)
    return 0


def _cores() -> tuple[set[int], set[int]]:
    """The server's, and the clients'."""
    cores = sorted(os.sched_getaffinity(0))
    return ({cores[1]}, {cores[0]}) if len(cores) > 1 else ({cores[0]}, {cores[0]})


def _rates(arguments: argparse.Namespace, server: Server, cores: set[int]) -> list[Row]:
    import torch

    from eval.predictor import Decoding, Predictor
    from tools.dev.bench.evaluate import questions
    from tools.dev.bench.measure import compare

    torch.set_num_threads(1)
    predictor = Predictor.open(arguments.bundle, device="cpu")
    decoding = Decoding(max_new_tokens=arguments.tokens, speculate="never")
    asked = questions(arguments.questions)
    bodies = _bodies(asked, arguments.tokens, "bench")
    expected = predictor.answer(asked, decoding)
    for num_clients in (1, MANY):
        equal = sum(a == b for a, b in zip(server.answers(bodies, num_clients), expected, strict=True))
        print(f"{num_clients} clients: {equal} of {len(asked)} answers are the library's")
    many, one = partial(_rate, server, bodies, MANY), partial(_rate, server, bodies, 1)
    new = _passes(lambda fresh: _rate(server, _bodies(fresh, arguments.tokens, "bench"), MANY), asked)
    batches = _own(lambda: predictor.answer(asked, decoding, batch_size=MANY), asked, cores)
    pairs: list[tuple[str, Callable[[], float], Callable[[], float]]] = [
        ("16 clients / batches of 16", many, batches),
        ("16 clients, new pictures / batches of 16", new, batches),
        ("1 client / stream", one, _own(lambda: _streamed(predictor, asked, decoding), asked, cores)),
        ("16 clients / 1 client", many, one),
    ]
    return [
        compare(what, "answers/CPU-s", left, right, rounds=arguments.rounds, packages=PACKAGES)
        for what, left, right in pairs
    ]


def _streamed(predictor: Predictor, asked: Sequence[Query], decoding: object) -> list[str]:
    return ["".join(predictor.stream(query, decoding)) for query in asked]  # type: ignore[arg-type]


def _passes(rate: Callable[[Sequence[Query]], float], asked: Sequence[Query]) -> Callable[[], float]:
    """The rate of another pass with each call: the same questions, about pictures that differ by a pixel from all."""
    numbers = count()

    def next_rate() -> float:
        fresh = []
        for query in asked:
            (image,) = query.images
            assert isinstance(image, Image.Image)
            drawn, number = image.copy(), next(numbers)
            drawn.putpixel((0, 0), (number % 251, number // 251 % 251, 128))
            fresh.append(replace(query, images=(drawn,)))
        return rate(fresh)

    return next_rate


def _bodies(asked: Sequence[Query], num_tokens: int, model: str) -> list[bytes]:
    from tools.dev.bench.serving import body_of

    bodies = []
    for query in asked:
        (image,) = query.images
        assert isinstance(image, Image.Image)
        stream = io.BytesIO()
        image.save(stream, "PNG")
        bodies.append(body_of(stream.getvalue(), "png", query.turns[0].text, num_tokens, model))
    return bodies


def _rate(server: Server, bodies: Sequence[bytes], num_clients: int) -> float:
    """Answers by second of the server's CPU time."""
    before_s = server.cpu_s()
    server.answers(bodies, num_clients)
    return len(bodies) / (server.cpu_s() - before_s)


def _own(work: Callable[[], list[str]], asked: Sequence[Query], cores: set[int]) -> Callable[[], float]:
    """The rate of work in this thread, which has `cores` meanwhile."""

    def rate() -> float:
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, cores)
        before_s = time.process_time()
        try:
            work()
            return len(asked) / (time.process_time() - before_s)
        finally:
            os.sched_setaffinity(0, before)

    return rate


def _wall_rate(server: Server, bodies: Sequence[bytes]) -> float:
    started_s = time.perf_counter()
    server.answers(bodies, MANY)
    return len(bodies) / (time.perf_counter() - started_s)


def _waited_s(server: Server, bodies: Sequence[bytes], share: float) -> float:
    """Seconds within which so large a share of the questions of 16 clients is answered."""
    waited_s = sorted(seconds for _, seconds in server.timed_answers(bodies, MANY))
    return waited_s[math.ceil(share * len(waited_s)) - 1]


def _peer(arguments: argparse.Namespace, server: Server, cores: set[int], folder: Path) -> list[Row]:
    """Answers a second of both servers at 16 clients, in turns."""
    if arguments.peer is None:
        return []
    from tools.dev.bench.evaluate import questions
    from tools.dev.bench.measure import compare
    from tools.dev.bench.serving import serving
    from trainer.distributed.ports import choose_port

    port = choose_port()
    command = [word.replace("PORT", str(port)) for word in shlex.split(arguments.peer)]
    asked = questions(arguments.questions)
    ours = _bodies(asked, arguments.tokens, "bench")
    theirs = _bodies(asked, arguments.tokens, arguments.peer_model or str(arguments.bundle))
    with serving(command, port, cores, folder / "peer.log") as peer:
        equal = sum(a.strip() == b for a, b in zip(peer.answers(theirs, MANY), server.answers(ours, MANY), strict=True))
        print(f"the peer: {equal} of {len(asked)} answers are the same")
        left, right = partial(_wall_rate, server, ours), partial(_wall_rate, peer, theirs)
        late, usual = partial(_waited_s, server, ours, 0.95), partial(_waited_s, peer, theirs, 0.5)
        pairs = [
            ("16 clients / the other server", "answers/s", left, right),
            ("p95 of 16 clients / median of the other server", "s", late, usual),
        ]
        return [compare(*pair, rounds=arguments.rounds, packages=PACKAGES) for pair in pairs]


def _load(arguments: argparse.Namespace, server: Server) -> list[Row]:
    """What large pictures do to others, and to the memory."""
    from tools.dev.bench.measure import row
    from tools.dev.bench.serving import body_of, large_picture

    large = body_of(large_picture(*_LARGE, noisy_rows=_NOISY_ROWS), "png", "What is it?", 2, "bench")
    slowest_s = _slowest(server, [large] * 3)
    photo = body_of(large_picture(*_PHOTO), "png", "What is it?", 2, "bench")
    server.forget_peak()
    idle = server.memory("VmRSS")
    server.answers([photo] * arguments.photos, arguments.photos)
    beyond = (server.memory("VmHWM") - idle) / 1e9
    return [
        row("slowest /health while decoding", "s; the peer is the bar", slowest_s, HEALTH_S, PACKAGES),
        row("memory under large pictures", "GB; the peer is the budget", beyond, PICTURE_GB, PACKAGES),
    ]


def _slowest(server: Server, bodies: Sequence[bytes]) -> float:
    """The slowest /health while the bodies are answered at once."""
    slowest_s = 0.0
    with ThreadPoolExecutor(1) as pool:
        busy = pool.submit(server.answers, bodies, len(bodies))
        while not busy.done():
            slowest_s = max(slowest_s, server.get("/health")[1])
            time.sleep(0.01)
        busy.result()
    return slowest_s


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
