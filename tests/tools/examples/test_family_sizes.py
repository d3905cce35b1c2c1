"""The numbers that the families' descriptions claim are those that preflight counts, on shapes alone."""

from __future__ import annotations

import pytest

from models.common.errors import run_cli
from models.common.source import PartFacts
from tests.support.paths import REPOSITORY
from tools.preflight.__main__ import main
from trainer.config.recipe import Recipe, load_recipe


def preflight(recipe: str, stage: str, *overrides: str) -> int:
    words = [str(REPOSITORY / "recipes" / f"{recipe}.yaml"), "--stage", stage, *overrides]
    return run_cli(main, [*words, "--gpus", "1", "--gpu-memory", "80GB"])


@pytest.mark.parametrize(
    ("recipe", "stage", "overrides", "claims"),
    [
        # "only a lightweight projection layer (4.2M parameters)", "0.11% of total model parameters" of a 4-bit model
        (
            "vicuna7b_clip_linear",
            "align",
            ["model.language.load=nf4"],
            ["4,198,400 (4.2M) of 7,045,793,792", "0.11% of 3,807,791,104"],
        ),
        # "~583M (495M trainable)"
        ("qwen05b_clip_mlp", "full", [], ["495,525,504 (495.5M) of 582,981,504 (583.0M)"]),
        # the two linear layers of LLaVA-1.5's projector; its adapters with rank 128 on every linear layer
        ("llava15_vicuna7b", "lora", [], ["20,979,712 (21.0M)"]),
        # 32 queries over six layers of DistilBERT; without adapter, matching and captioning heads
        ("smollm_vit_qformer", "contrast", [], ["109,311,489 (109.3M)"]),
    ],
)
def test_parameters_are_as_many_as_claimed(
    recipe: str, stage: str, overrides: list[str], claims: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    preflight(recipe, stage, *overrides)
    printed = capsys.readouterr().out
    for claim in claims:
        assert claim in printed, printed


def test_a_contrast_without_a_qformer_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert preflight("smollm_vit_qformer", "contrast", "model.projector={kind: mlp}") == 2
    assert "image_text teaches a projector that reads text, and model.projector.kind is mlp" in capsys.readouterr().err


def test_a_projector_s_shape_counts_the_rows_of_each_matrix() -> None:
    """By hand: 2 queries over 10 features of width 6, one layer of width 4 and 8, language width 5."""
    recipe: Recipe = load_recipe(REPOSITORY / "recipes" / "smollm_vit_qformer.yaml")
    config = recipe.model.projector.model_copy(update={"num_queries": 2})
    text = {"dim": 4, "hidden_dim": 8, "n_layers": 1}
    shape = config.shape(6, 5, 10, lambda path: PartFacts(text, path, None))
    own, cross, inner, adapter = 4 * 4 * 4, 2 * 4 * 4 + 2 * 6 * 4 * (10 / 2), 2 * 4 * 8, 4 * 5 + 5 * 5
    assert shape.weights == own + cross + inner + adapter
