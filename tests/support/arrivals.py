"""Queries of every kind with decodings of every kind, and batches that they join and leave at random."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from eval.batch import Batch, Row
from eval.kv_cache import DynamicKVCache, KVCache
from eval.predictor import Decoding, Predictor, Query, Turn
from eval.static_cache import StaticKVCache
from tests.support.bundles import image

CACHES = ("growing", "fixed")
NUM_ROWS, NUM_POSITIONS = 16, 16 * 256

TEXTS = ("What?", "Which colour is the one on the left? How many are there?", "one two three four")
DECODINGS = (
    Decoding(max_new_tokens=4, speculate="never"),
    Decoding(max_new_tokens=12, speculate="never"),
    Decoding(max_new_tokens=12, temperature=0.5, seed=1),
    Decoding(max_new_tokens=32, temperature=1.0, seed=2, top_p=0.8),
    Decoding(max_new_tokens=32, temperature=1.5, seed=3),
    Decoding(max_new_tokens=32, stop=("e", "an"), speculate="never"),
)

Asked = list[tuple[Query, Decoding]]


def mixed(sizes: Sequence[tuple[int, int]] = ((64, 64), (90, 40), (40, 110))) -> Asked:
    """72 queries: one image, two, none, and a chat's second turn, each text with each decoding."""
    asked: Asked = []
    for number, text in enumerate(TEXTS):
        turn = Turn("user", text)
        shown = image("circle", sizes[number % len(sizes)]), image("square", sizes[(number + 1) % len(sizes)])
        chat = (turn, Turn("assistant", "A circle"), Turn("user", "And?"))
        queries = [Query(shown[:1], (turn,)), Query(shown, (turn,)), Query((), (turn,)), Query(shown[1:], chat)]
        asked += [(query, decoding) for query in queries for decoding in DECODINGS]
    return asked


def alone(predictor: Predictor, asked: Asked) -> list[str]:
    """Each answer by itself."""
    return [predictor.answer([query], decoding)[0] for query, decoding in asked]


def make_cache(predictor: Predictor, kind: str, num_rows: int = NUM_ROWS) -> KVCache:
    """A cache of a kind of `CACHES`."""
    if kind == "growing":
        return DynamicKVCache(predictor.model)
    return StaticKVCache(predictor.model, num_rows=num_rows, total_positions=NUM_POSITIONS, device=torch.device("cpu"))


def answer_in_company(
    predictor: Predictor, asked: Asked, kind: str, seed: int, *, kept_bytes: int = 1 << 20
) -> list[str]:
    """The answers where queries come in random order at random times, some together."""
    chance = random.Random(seed)
    prompts = [predictor.prompt(query) for query, _ in asked]
    rows = [predictor.row(prompt, decoding) for prompt, (_, decoding) in zip(prompts, asked, strict=True)]
    texts: dict[Row, str] = dict.fromkeys(rows, "")
    waiting = chance.sample(rows, len(rows))
    batch = Batch(predictor.make_reader(kept_bytes, kept_bytes), make_cache(predictor, kind))
    while waiting or batch.rows:
        newcomers = waiting[: chance.choice((0, 1, 2, 4))]
        if newcomers and len(batch.rows) + len(newcomers) <= NUM_ROWS and batch.needs(newcomers) <= NUM_POSITIONS:
            del waiting[: len(newcomers)]
            _add(texts, batch.join(newcomers))
        batch.leave()
        if batch.rows:
            _add(texts, batch.step())
        batch.leave()
    return [texts[row] for row in rows]


def _add(texts: dict[Row, str], pieces: list[tuple[Row, str]]) -> None:
    for row, text in pieces:
        texts[row] += text
