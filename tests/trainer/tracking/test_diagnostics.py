"""Looking inside changes nothing and shows what is there: values in their layers, predictions at their tokens."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from data_pipeline.batch import collate
from models.build import build_vlm, read_metadata
from models.common import files
from models.spec import IGNORE_INDEX
from tests.support.backbones import tiny_recipe
from tests.support.shards import write_set
from tests.trainer.validation.test_validator import PlainEngine
from trainer.config.recipe import Recipe
from trainer.engine.train_step import TrainingTask
from trainer.objectives.next_token import NextToken
from trainer.tracking.diagnostics import TokenTable, layer_histograms, layer_of, predict, write_table
from trainer.validation.held_out import HeldOut
from trainer.validation.html_report import best_effort, write_page


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
    facts = read_metadata(recipe.model, 256)
    module = TrainingTask(
        build_vlm(recipe.model, facts, frozen_dtype=torch.float32, seed=0), NextToken().build(), "fp32"
    )
    held_out = HeldOut.open(recipe.stage("align").data, facts, 3)
    rows = [(sample,) for sample in held_out.encoded(range(3)) if hasattr(sample, "input_ids")]
    batch = collate(rows, facts.text)
    guessed = predict(module, PlainEngine(module), batch).predictions_BL
    learnt_BL = batch.tokens.targets_BL != IGNORE_INDEX
    learnt_BL[1:] = False
    batch.tokens.targets_BL[learnt_BL] = guessed[learnt_BL]  # the first row is all right, the rest is chance
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


def test_a_page_that_the_disk_refuses_costs_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.html"
    monkeypatch.setattr(files.secrets, "token_hex", lambda num_bytes: "0")
    (tmp_path / f".page.html.{os.getpid()}.0.tmp").symlink_to("/dev/full")
    with best_effort(page):
        write_page(page, "a title", "a body")
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("WARNING", f"{page}: No space left on device; training goes on without it")
    ]
    assert not page.exists()
