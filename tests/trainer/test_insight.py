"""Looking inside changes nothing and shows what is there: values in their layers, predictions at their tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from data_pipeline.batch import collate
from models.build import build_vlm, read_facts
from models.spec import IGNORE_INDEX
from tests.support.backbones import tiny_recipe
from tests.support.shards import write_set
from tests.trainer.test_validation import PlainEngine
from trainer.config import NextToken
from trainer.held_out import HeldOut
from trainer.insight import Insight, TokenTable, layer_histograms, layer_of, predict, write_table
from trainer.objectives import build_objective
from trainer.pages import expendable, write_page
from trainer.recipe import Recipe
from trainer.step import TrainStep


def test_a_histogram_holds_every_value_of_its_layer() -> None:
    name = "language.model.layers.3.self_attn.q_proj.lora_{}.default.weight"
    down, up = torch.linspace(-2, 1, 500), torch.cat([torch.full((11,), 3.0), torch.tensor([torch.nan, torch.inf])])
    found = layer_histograms([(name.format("A"), down.view(5, 100)), (name.format("B"), up)], "weights/")
    (histogram,) = found.values()
    assert list(found) == ["weights/language.model.layers.3"]
    assert (sum(histogram.counts), histogram.counts[-1], histogram.num_not_finite) == (511, 11, 2)
    assert (histogram.edges[0], histogram.edges[-1]) == (-2.0, 3.0)
    assert layer_of("projector.linear_1.weight") == "projector.linear_1"
    assert sum(layer_histograms([("projector.linear.bias", torch.zeros(4))])["projector.linear"].counts) == 4


def test_accuracy_by_position_counts_each_answer_from_its_first_token() -> None:
    none = IGNORE_INDEX
    targets = torch.tensor([[none, 5, 6, none, 7], [8, 9, none, none, none]])
    predictions = torch.tensor([[none, 5, 1, none, 7], [1, 9, none, none, none]])
    table = TokenTable(torch.zeros_like(targets), targets, predictions)
    assert table.by_position() == [(2, 3), (1, 2)]
    assert table.accuracy == pytest.approx(3 / 5)


def test_predictions_are_those_of_the_loss_and_the_page_shows_them(tmp_path: Path) -> None:
    write_set(tmp_path / "shards", [3])
    recipe = Recipe.model_validate_json(json.dumps(tiny_recipe(tmp_path, tmp_path / "shards")))
    facts = read_facts(recipe.model, 256)
    module = TrainStep(
        build_vlm(recipe.model, facts, frozen_dtype=torch.float32, seed=0), build_objective(NextToken()), "fp32"
    )
    held_out = HeldOut(recipe.stage("align").data, facts, 3)
    rows = [(sample,) for sample in held_out.encoded(range(3)) if hasattr(sample, "input_ids")]
    batch = collate(rows, facts.text)
    guessed = predict(module, PlainEngine(module), batch).predictions_BL
    learnt_BL = batch.targets_BL != IGNORE_INDEX
    learnt_BL[1:] = False
    batch.targets_BL[learnt_BL] = guessed[learnt_BL]  # the first row is all right, the rest is chance
    with torch.no_grad():
        sums = module(batch)
    assert 0 < int(sums.num_correct) < batch.num_targets
    table = predict(module, PlainEngine(module), batch)
    assert int(((table.predictions_BL == table.targets_BL) & (table.targets_BL != IGNORE_INDEX)).sum()) == int(
        sums.num_correct
    )
    write_table(tmp_path / "insight" / "tokens.html", "tiny <align>", table, facts.tokenizer)
    page = (tmp_path / "insight" / "tokens.html").read_text()
    assert page.count('class="right"') == int(sums.num_correct)
    assert page.count('class="wrong"') == batch.num_targets - int(sums.num_correct)
    assert "tiny &lt;align&gt;" in page
    assert page.count('class="row"') == 3


def test_a_page_that_the_disk_refuses_costs_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    (tmp_path / ".page.html.tmp").symlink_to("/dev/full")
    with expendable(page):
        write_page(page, "a title", "a body")
    assert capsys.readouterr().out == f"warning: {page}: No space left on device; training goes on without it\n"
    assert not page.exists()


def test_moments_are_those_asked_for() -> None:
    never, every = Insight(None, None), Insight(2, 3)
    assert not any(never.wants_histograms(step) or never.wants_table(step) for step in range(1, 7))
    assert [step for step in range(1, 7) if every.wants_histograms(step)] == [2, 4, 6]
    assert [step for step in range(1, 7) if every.wants_table(step)] == [3, 6]
