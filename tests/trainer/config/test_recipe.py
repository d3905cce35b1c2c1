"""Recipes: what ships loads and round-trips; what is wrong is named by path, finding and what is allowed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from models.common.errors import InputError
from tests.support.paths import REPOSITORY
from trainer.config.recipe import Recipe, load_recipe
from trainer.config.tuning import Full

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
        (
            "model.projector={kind: qformer, path: x, num_querys: 3}",
            ["model.projector.num_querys", "unknown key", "num_queries"],
        ),
        ("model.projector={factor: 2}", ["model.projector", '{"factor": 2}', "a mapping with a `kind`"]),
        ("model.projector={kind: pixel_shuffle, factor: 0}", ["model.projector.factor: found 0", "greater than 0"]),
        ("stages.align.objective.kind=next", ["stages.align.objective.kind", "next_token, multi_token, image_text"]),
        ("stages.align.batch.global_rows=many", ["stages.align.batch.global_rows", '"many"', "integer"]),
        ("stages.align.batch.global_rows=0", ["stages.align.batch.global_rows", "found 0", "greater than 0"]),
        ("stages.align.engine.precision=fp8", ["stages.align.engine.precision", "fp8", "bf16", "fp32"]),
        ("stages.align.tune.projector.kind=frozen", ["stages.align.tune.projector.learning_rate", "unknown key"]),
        ("stages.align.tune={}", ["stages.align: tune: every part is frozen"]),
        ("stages.align.optimizer.weight_decay=0.1", ["unknown key; it is one of another part"]),
        ("stages.lora.tune.language.targets=['']", ["stages.lora.tune.language.targets", "at least 1 character"]),
        ("stages.align.tune.projector.frozen=['']", ["stages.align.tune.projector.frozen.0", "at least 1 character"]),
        ("stages.align.data.control_tokens=['']", ["stages.align.data.control_tokens.0", "at least 1 character"]),
        ("stages.align.tune.vision=3", ["stages.align.tune.vision: found 3"]),
        ("stages.align.data.sources=" + "x" * 100, ['"xxx', "..."]),
        ("stages.align.init=lora", ["stages.align.init", "lora", "not a stage above it"]),
        ("stages.lora.init=algin", ["stages.lora.init", "did you mean 'align'?"]),
        ("stages.lora.tune.language.targets=[]", ["stages.lora.tune.language.targets", "at least 1 item"]),
        (
            "stages.align.tune.future={kind: full, learning_rate: 1e-3}",
            ["tune.future: the model has none"],
        ),
        ("model.image={kind: anyres, pinpoints: []}", ["model.image.pinpoints", "at least 1 item"]),
        ("model.image={kind: anyres, pinpoints: [[336, 33600]]}", ["model.image.pinpoints.0.1", "equal to 10000"]),
        ("model.image={kind: anyres, pinpoints: [[0, 336]]}", ["model.image.pinpoints.0.0", "greater than 0"]),
        ("stages.align.tune.projector.weight_decay=-1", ["weight_decay: found -1", "greater than or equal to 0"]),
        ("stages.align.tune.projector.learning_rate=1e400", ["learning_rate: found Infinity", "finite number"]),
        ("stages.align.tune.projector.learning_rates={linear_1: .nan}", ["linear_1: found NaN", "finite number"]),
        ("stages.align.optimizer.betas=[0.9, 1.0]", ["optimizer.betas.1", "less than 1"]),
        ("seed.deep=1", ["seed", "nothing can be set below it"]),
        ("stages.align.data.sources.7.path=x", ["'7'", "list of 1"]),
        ("stages.align.data.sources.first.path=x", ["'first'", "list of 1"]),
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


def test_a_list_with_a_wrong_item_is_not_called_empty() -> None:
    with pytest.raises(InputError) as caught:
        load_recipe(LLAVA, ["stages.align.data.sources=[{path: 5}]"])
    assert str(caught.value).endswith("stages.align.data.sources.0.path: found 5; input should be a valid string")
    with pytest.raises(InputError, match=r"sources: found \[\]; at least 1 item is needed$"):
        load_recipe(LLAVA, ["stages.align.data.sources=[]"])


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


@pytest.mark.parametrize(
    ("text", "value"), [("2E-05", 2e-5), ("2e-5", 2e-5), ("3.", 3.0), (".5", 0.5), ("+1.5e+1", 15)]
)
def test_floats_are_those_of_yaml_1_2(text: str, value: float) -> None:
    projector = load_recipe(LLAVA, [f"stages.lora.tune.projector.learning_rate={text}"]).stages["lora"].tune.projector
    assert isinstance(projector, Full)
    assert projector.learning_rate == value


@pytest.mark.parametrize(("text", "value"), [("7", 7), ("-0", 0), ("0x10", 16), ("1_000", 1000)])
def test_integers_stay_integers(text: str, value: int) -> None:
    seed = load_recipe(LLAVA, [f"seed={text}"]).seed
    assert (seed, type(seed)) == (value, int)


def test_what_looks_like_a_number_in_a_name_is_text() -> None:
    assert load_recipe(LLAVA, ["run=1e-3x"]).run == "1e-3x"


def test_a_key_without_a_value_is_filled_by_an_override(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(LLAVA.read_text() + "\ntracking:\n")
    assert load_recipe(tmp_path / "r.yaml", ["tracking.log_every_steps=3"]).tracking.log_every_steps == 3


def numbers_in(values: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Where the floats of a recipe stand, those that are null by default among them."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield from numbers_in(value, (*path, key))
    elif isinstance(values, list):
        for place, value in enumerate(values):
            yield from numbers_in(value, (*path, str(place)))
    elif isinstance(values, float) or path[-1] in {"weight", "clip_norm", "init_gain"}:
        yield path


@pytest.mark.parametrize("stem", ["llava15_vicuna7b", "openclip_decoder_mtp", "smollm_vit_qformer"])
def test_every_float_is_finite_and_bounded(stem: str) -> None:
    file = REPOSITORY / "recipes" / f"{stem}.yaml"
    values = load_recipe(file).model_dump(mode="json")
    paths = list(numbers_in(values))
    assert len(paths) > 20
    for path in paths:
        for bad in (math.nan, math.inf, -math.inf, -1.0, 1e12):
            varied = json.loads(json.dumps(values))
            place = varied
            for key in path[:-1]:
                place = place[int(key)] if isinstance(place, list) else place[key]
            place[int(path[-1]) if isinstance(place, list) else path[-1]] = bad
            with pytest.raises(ValidationError):
                Recipe.model_validate_json(json.dumps(varied))


@pytest.mark.parametrize(
    "key",
    [
        "stages.align.batch.global_rows",
        "stages.align.batch.micro_rows",
        "stages.align.duration.count",
        "stages.align.data.max_length",
        "stages.align.data.num_workers",
        "stages.align.data.shuffle_window",
        "stages.lora.tune.language.rank",
    ],
)
def test_what_memory_processes_and_loops_follow_is_bounded(key: str) -> None:
    with pytest.raises(InputError, match=rf"{key}: found {10**20}; input should be less than or equal to"):
        load_recipe(LLAVA, [f"{key}={10**20}"])
