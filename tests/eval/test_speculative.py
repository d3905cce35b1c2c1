"""Speculative decoding is greedy decoding, token for token; what pays is told by the clock."""

from __future__ import annotations

import json
import random
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.record import Turn
from eval.decoding import Decoding
from eval.generation import write_greedily
from eval.kv_cache import DynamicKVCache
from eval.predictor import Predictor
from eval.query import Query
from eval.speculate import main as compare
from eval.speculative import PROBED_STEPS, Speculation, SpeculationGate, write_speculatively
from models.common.errors import run_cli
from tests.support.backbones import make_clip, make_language, tiny_recipe
from tests.support.bundles import image
from tests.support.checkpoints import write_finished
from tools.export.merge import main as merge

HEADS: dict[str, dict[str, Any]] = {
    "parallel": {"kind": "parallel", "num_tokens": 4},
    "sequential": {"kind": "sequential"},
}
NUM_PROMPTS, NUM_TOKENS = 50, 10
SIZES = ((64, 64), (90, 40), (40, 110))


@pytest.fixture(scope="module", params=HEADS)
def predictor(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    """Our decoder with parallel heads; a pretrained one with a sequential module beside LoRA, and AnyRes."""
    folder = tmp_path_factory.mktemp(request.param)
    make_clip(folder / "vision")
    make_language(folder / "language")
    recipe = tiny_recipe(folder, folder / "shards")
    recipe["model"]["future"] = HEADS[request.param]
    tune = recipe["stages"]["lora"]["tune"]
    tune["future"] = {"kind": "full", "learning_rate": 1e-3}
    if request.param == "parallel":
        shape = {"num_layers": 2, "num_heads": 4, "width": 32, "max_positions": 512}
        recipe["model"]["language"] = {"kind": "decoder", "tokenizer": str(folder / "language"), **shape}
        tune["language"] = {"kind": "full", "learning_rate": 1e-3}
    else:
        recipe["model"]["image"] = {"kind": "anyres", "pinpoints": [[48, 96], [96, 48]]}
    recipe["stages"]["lora"]["init"] = None
    write_finished(recipe, "lora")
    assert merge([recipe["run"], str(folder / "bundle"), "--stage", "lora", "--probes", "2"]) == 0
    return Predictor.open(folder / "bundle", device="cpu")


def inputs_of(predictor: Predictor, number: int) -> dict[str, Any]:
    shown = (image("circle", SIZES[number % 3]),) if number % 4 else ()
    query = Query(shown, (Turn("user", f"What is number {number * 37}?"),))
    return predictor.inputs_of(query)


def greedy_ids(predictor: Predictor, inputs: dict[str, Any], num_tokens: int) -> list[int]:
    return [ids[0] for ids in write_greedily(predictor.model, inputs, DynamicKVCache(predictor.model), num_tokens)]


@pytest.mark.slow
def test_every_token_is_the_greedy_one(predictor: Predictor) -> None:
    """Fifty prompts with each kind of heads, whose guesses are as good as random ones are."""
    counts = Speculation()
    for number in range(NUM_PROMPTS):
        inputs = inputs_of(predictor, number)
        guessing = write_speculatively(predictor.model, inputs, counts, SpeculationGate(clock=None))
        assert [ids[0] for ids in islice(guessing, NUM_TOKENS)] == greedy_ids(predictor, inputs, NUM_TOKENS)
    assert len(counts.acceptance) == predictor.model.future.num_drafts


@pytest.mark.slow
def test_guesses_are_kept_up_to_the_first_wrong_one(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guesses that are right but for planted mistakes: every number of kept ones comes up, and is counted."""
    inputs, chance = inputs_of(predictor, 1), random.Random(0)
    truth = greedy_ids(predictor, inputs, 210)

    class Planted:
        def __init__(self, model: Any) -> None:
            self.num_certain = 0

        def learn(self, states_LD: Any, following: list[int], images: Any = None) -> None:
            self.num_certain += 1 if images is not None else len(following)
            assert truth[: self.num_certain][-1] == following[-1]

        def guess(self) -> list[int]:
            right = truth[self.num_certain : self.num_certain + 3]
            return [token if chance.random() < 0.7 else token + 1 for token in right]

    monkeypatch.setattr("eval.speculative._Heads", Planted)
    counts = Speculation()
    steps = write_speculatively(predictor.model, inputs, counts, SpeculationGate(clock=None))
    assert [ids[0] for ids in islice(steps, 200)] == truth[:200]
    first, second, third = counts.acceptance
    assert 1 > first > second > third > 0
    assert counts.tokens_per_forward == pytest.approx(1 + sum(counts.num_accepted) / counts.num_forwards)
    assert counts.tokens_per_forward > 1.5


def test_an_answer_is_the_same_however_it_is_written(predictor: Predictor) -> None:
    query = Query((image("square"),), (Turn("user", "What?"),))
    plain = predictor.answer([query], Decoding(max_new_tokens=40, speculate="never"))
    assert predictor.speculation is not None
    before = predictor.speculation.num_forwards
    assert predictor.answer([query], Decoding(max_new_tokens=40)) == plain
    assert predictor.speculation.num_forwards > before


def test_it_goes_on_only_while_a_token_takes_less_time_with_guesses() -> None:
    for guessing_s, pays in ((0.019, True), (0.021, False)):
        gate = SpeculationGate()
        assert not gate.should_guess(), "the first steps are for comparison"
        for _ in range(PROBED_STEPS):
            gate.told(0.010, 1, with_guesses=False)
        while gate.should_guess() and gate._num_steps < 15:
            gate.told(guessing_s, 2, with_guesses=True)
        gate.told(guessing_s, 2, with_guesses=True)
        assert gate.should_guess() is pays


def test_the_comparison_is_a_command(predictor: Predictor, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "images").mkdir()
    for number, size in enumerate(SIZES):
        image("square", size).save(tmp_path / "images" / f"{number}.png")
    bundle = predictor.model.config._name_or_path
    words = [bundle, "--images", str(tmp_path / "images"), "--max-new-tokens", "6", "--device", "cpu"]
    assert run_cli(compare, [*words, "--out", str(tmp_path / "report.json")]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["identical"]
    assert report["prompts"] == 3
    assert report["forwards_per_token"]["always"] <= 1.0
    assert "acceptance_by_head" in capsys.readouterr().out
