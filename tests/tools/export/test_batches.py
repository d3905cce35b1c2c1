"""Answers do not depend on the batch, in bundles of every family: one at a time as sixteen at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import sightline
from eval.predictor import Decoding, Predictor, Query, Turn
from tests.support import published
from tests.support.arrivals import CACHES, answer_in_company, mixed
from tests.support.arrivals import alone as one_by_one
from tests.support.backbones import IMAGE_SIZE
from tests.support.bundles import image
from tests.support.checkpoints import write_finished
from tests.support.qformer import qformer_recipe
from tests.tools.conftest import merge, run_of

S = IMAGE_SIZE
SIZES = ((64, 64), (90, 40), (40, 110), (200, 30))


def plain(folder: Path) -> dict[str, Any]:
    return run_of(folder)


def linear(folder: Path) -> dict[str, Any]:
    return run_of(folder, projector="linear")


def qwen2(folder: Path) -> dict[str, Any]:
    return run_of(folder, language="qwen2", tied=True)


def qwen3(folder: Path) -> dict[str, Any]:
    return run_of(folder, language="qwen3")


def anyres(folder: Path) -> dict[str, Any]:
    recipe = run_of(folder)
    recipe["model"]["image"] = {"kind": "anyres", "pinpoints": [[S, 2 * S], [2 * S, S], [2 * S, 2 * S], [S, 3 * S]]}
    return recipe


def q_former(folder: Path) -> dict[str, Any]:
    recipe = qformer_recipe(folder, folder / "shards")
    recipe["stages"]["lora"]["init"] = None
    return recipe


def perceiver(folder: Path) -> dict[str, Any]:
    recipe = run_of(folder)
    recipe["model"]["projector"] = {"kind": "perceiver", "num_queries": 5, "num_layers": 2, "num_heads": 4}
    return recipe


def pixel_shuffle(folder: Path) -> dict[str, Any]:
    recipe = run_of(folder)
    recipe["model"]["projector"] = {"kind": "pixel_shuffle", "factor": 2}
    return recipe


def decoder(folder: Path) -> dict[str, Any]:
    """From scratch, with heads that guess further tokens where a question is asked alone."""
    recipe = run_of(folder, width=32)
    shape = {"num_layers": 2, "num_heads": 4, "width": 32, "max_positions": 512}
    language = {"kind": "decoder", "tokenizer": str(folder / "language"), **shape}
    recipe["model"] |= {"language": language, "future": {"kind": "parallel", "num_tokens": 3}}
    full = {"kind": "full", "learning_rate": 1e-2}
    tune = {"projector": full, "language": full, "future": full}
    recipe["stages"] = {
        "lora": recipe["stages"]["lora"] | {"init": None, "objective": {"kind": "multi_token"}, "tune": tune}
    }
    return recipe


FAMILIES = (plain, linear, qwen2, qwen3, anyres, q_former, perceiver, pixel_shuffle, decoder)


def assert_answers_need_no_company(model: Predictor) -> None:
    texts = ["What?", "What is at the left of the red one, and how many of them are there?", "Two words: circle square"]
    queries = [
        Query(
            () if place % 8 == 7 else (image(("circle", "square")[place % 2], SIZES[place % 4]),),
            (Turn("user", texts[place % 3]),),
        )
        for place in range(16)
    ]
    decoding = Decoding(max_new_tokens=10)
    alone = model.answer(queries, decoding, batch_size=1)
    assert model.answer(queries, decoding, batch_size=16) == alone
    assert len(set(alone)) > 2
    asked = [(query, decoding) for query in queries] + mixed(SIZES)[::7]
    alone += one_by_one(model, asked[len(queries) :])
    for kind in CACHES:
        assert answer_in_company(model, asked, kind, seed=0) == alone


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_one_at_a_time_as_sixteen_at_once_and_as_in_random_company(tmp_path: Path, family: Any) -> None:
    recipe = family(tmp_path)
    recipe["stages"]["lora"]["engine"]["precision"] = "fp32"  # in bf16 near ties fall otherwise in other batches
    write_finished(recipe, "lora")
    assert merge(recipe, tmp_path / "bundle") == 0
    assert_answers_need_no_company(sightline.load(tmp_path / "bundle", device="cpu"))


@pytest.mark.slow
@pytest.mark.parametrize("family", published.FAMILIES)
def test_so_does_a_published_model(tmp_path: Path, family: str) -> None:
    """LLaVA's three, and those whose images keep their size."""
    assert_answers_need_no_company(Predictor.open(published.make_published(tmp_path / family, family), device="cpu"))
