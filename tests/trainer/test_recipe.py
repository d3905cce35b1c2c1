"""Recipes: what ships loads and round-trips; what is wrong is named by path, finding and what is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.errors import InputError
from tests.support.paths import REPOSITORY
from trainer.config import Full
from trainer.recipe import Recipe, load_recipe

RECIPES = sorted((REPOSITORY / "recipes").glob("*.yaml"))
LLAVA = REPOSITORY / "recipes" / "llava15_vicuna7b.yaml"


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_every_recipe_loads_and_round_trips(file: Path) -> None:
    recipe = load_recipe(file)
    assert recipe.name == file.stem
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


def test_all_families_are_there() -> None:
    families = {
        "vicuna7b_clip_linear",
        "qwen05b_clip_mlp",
        "smollm_vit_qformer",
        "qwen3b_vit_mlp_anyres",
        "openclip_decoder_mtp",
        "llava15_vicuna7b",
    }
    assert families <= {file.stem for file in RECIPES}


def test_llava15_has_its_own_numbers() -> None:
    recipe = load_recipe(LLAVA)
    align, lora = recipe.stages["align"], recipe.stages["lora"]
    assert isinstance(align.tune.projector, Full)
    assert (align.tune.projector.learning_rate, align.batch.global_rows) == (1e-3, 256)
    assert isinstance(lora.tune.projector, Full)
    assert (lora.tune.projector.learning_rate, lora.batch.global_rows) == (2e-5, 128)
    assert lora.tune.language.model_dump(include={"rank", "alpha", "learning_rate", "dropout"}) == {
        "rank": 128,
        "alpha": 256.0,
        "learning_rate": 2e-4,
        "dropout": 0.05,
    }
    assert align.schedule.warmup == 0.03
    assert align.schedule.kind == "cosine"


def test_overrides_reach_any_depth() -> None:
    recipe = load_recipe(
        LLAVA,
        [
            "run=elsewhere",
            "model.language.load=nf4",
            "stages.align.tune.projector.learning_rate=3e-4",
            "stages.align.data.sources.0.path=mine",
            "stages.align.duration={unit: steps, count: 5}",
            "tracking.wandb.project=demo",
        ],
    )
    align = recipe.stages["align"]
    assert isinstance(align.tune.projector, Full)
    assert align.tune.projector.learning_rate == 3e-4
    assert (recipe.run, align.data.sources[0].path, align.duration.count) == ("elsewhere", "mine", 5)
    assert recipe.tracking.wandb is not None


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stages.align.bach.global_rows=4", ["stages.align.bach", "unknown key", "batch"]),
        ("model.projector.kind=mlpx", ["model.projector.kind", "mlpx", "linear, mlp, qformer"]),
        ("stages.align.batch.global_rows=many", ["stages.align.batch.global_rows", '"many"', "integer"]),
        ("stages.align.batch.global_rows=0", ["stages.align.batch.global_rows", "found 0", "greater than 0"]),
        ("stages.align.engine.precision=fp8", ["stages.align.engine.precision", "fp8", "bf16", "fp32"]),
        ("stages.align.tune.projector.kind=frozen", ["stages.align.tune.projector.learning_rate", "unknown key"]),
        ("stages.align.tune={}", ["every part is frozen"]),
        ("stages.align.init=lora", ["stages.align.init", "lora", "not a stage above it"]),
        ("seed.deep=1", ["seed", "nothing can be set below it"]),
        ("stages.align.data.sources.7.path=x", ["'7'", "list of 1"]),
        ("nonsense", ["key.key=value"]),
        ("run=[", ["not valid YAML"]),
    ],
)
def test_a_wrong_value_is_named_in_one_line(override: str, words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        load_recipe(LLAVA, [override])
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    file = tmp_path / "short.yaml"
    file.write_text("name: short\nrun: x\nmodel: {vision: {kind: clip}}\nstages: {}\n")
    with pytest.raises(InputError) as caught:
        load_recipe(file)
    for words in ("model.vision.path: missing", "model.projector: missing", "stages"):
        assert words in str(caught.value)


def test_a_missing_file_lists_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(InputError, match=r"no such recipe.*recipes/llava15_vicuna7b\.yaml"):
        load_recipe("recipes/llava16.yaml")


def test_an_unknown_stage_lists_the_stages() -> None:
    with pytest.raises(InputError, match="it has align, lora"):
        load_recipe(LLAVA).stage("finetune")


def test_numbers_without_a_point_are_numbers(tmp_path: Path) -> None:
    text = LLAVA.read_text().replace("learning_rate: 2e-5", "learning_rate: 2E-05")
    (tmp_path / "r.yaml").write_text(text)
    projector = load_recipe(tmp_path / "r.yaml").stages["lora"].tune.projector
    assert isinstance(projector, Full)
    assert projector.learning_rate == 2e-5
