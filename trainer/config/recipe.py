"""Recipes: YAML -> one frozen `Recipe`, with `key=value` overrides and errors that tell the user what to change.

recipes/X.yaml --read--> dict --overrides--> dict --pydantic, strict--> Recipe
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, model_validator

from models.common.documents import read_as, read_value
from models.common.errors import InputError, single_line
from models.config import Model
from models.spec import Config
from trainer.config.errors import causes, explain, listed, nearest
from trainer.config.older import as_begun
from trainer.config.schema import StageConfig, TrackingConfig
from trainer.config.shipped import find_recipe, shipped
from trainer.config.tuning import Frozen


class Recipe(Config):
    """A model family and the stages that train it, in their order. A run is determined by this value."""

    name: str
    run: str
    """The directory for all files of a run."""
    seed: int = 0
    model: Model
    stages: dict[str, StageConfig] = Field(min_length=1)
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _check_init(self) -> Recipe:
        earlier: list[str] = []
        for name, stage in self.stages.items():
            if stage.init is not None and stage.init not in earlier:
                above = f"({listed(earlier)}){nearest(stage.init, earlier)}"
                raise ValueError(f"stages.{name}.init: {stage.init!r} is not a stage above it {above}")
            earlier.append(name)
        return self

    @model_validator(mode="after")
    def _objectives_find_the_parts_they_teach(self) -> Recipe:
        for name, stage in self.stages.items():
            try:
                stage.objective.check_model(self.model)
            except ValueError as error:
                raise ValueError(f"stages.{name}.objective: {error}") from error
        return self

    @model_validator(mode="after")
    def _a_plan_tunes_parts_that_are_there(self) -> Recipe:
        for name, stage in self.stages.items():
            if not isinstance(stage.tune.future, Frozen) and self.model.future is None:
                raise ValueError(f"stages.{name}.tune.future: the model has none; model.future says what it is")
        return self

    def stage(self, name: str) -> StageConfig:
        """The stage called `name`.

        Raises:
            InputError: there is none; it lists those there are.
        """
        if name not in self.stages:
            names = list(self.stages)
            there = f"{listed(names)}{nearest(name, names)}"
            raise InputError(f"--stage {name}: {self.name} has no such stage; it has {there}")
        return self.stages[name]


_VALUES: Any = dict[str, Any]


class _Loader(yaml.SafeLoader):
    """YAML 1.1, as PyYAML reads it, but with the floats of YAML 1.2: `1e-3` is a number here, not a string.

    Source: YAML 1.2.2, section 10.3.2. A point or an exponent is required, so that integers stay integers.
    """


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"""[-+]?(\d+\.\d*|\.\d+)([eE][-+]?\d+)?$
        |[-+]?\d+[eE][-+]?\d+$
        |[-+]?\.(inf|Inf|INF)$
        |\.(nan|NaN|NAN)$""",
        re.VERBOSE,
    ),
    list("-+0123456789."),
)


RECORD = "recipe.json"
"""In a run's directory: the recipe that it was started with last."""


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read the recipe in a YAML file.

    Where it does not say, a run that an earlier version began keeps what that did (`trainer.config.older`).

    Args:
        path: the file, or the record of a run.
        overrides: `a.b.c=value` each, applied in order; the value is YAML, and a number among the keys is a position in
            a list.

    Raises:
        InputError: one line that names everything that is wrong, by path, finding and what is allowed.
    """
    file = find_recipe(Path(path))
    values = _read(file)
    for override in overrides:
        _apply_override(values, override)
    try:
        # Strict decoding from JSON: a list may stand for a tuple and an int for a float, and nothing else is coerced.
        recipe = Recipe.model_validate_json(json.dumps(values))
    except (TypeError, ValueError, RecursionError) as error:
        if not isinstance(error, ValidationError):  # dates and sets of YAML, an anchor within itself
            raise InputError(f"{file}: holds what no recipe does: {single_line(error)}") from error
        raise InputError(
            f"{file}: " + "; ".join(explain(each, values, Recipe) for each in causes(error.errors()))
        ) from error
    return _as_begun(recipe, file if file.name == RECORD else Path(recipe.run) / RECORD)


def _as_begun(recipe: Recipe, record: Path) -> Recipe:
    """The recipe as the run of this record was begun; a record that is not there, or no JSON, says nothing."""
    try:
        stored = read_value(record)["stages"]
        before = {name: as_begun(stage, stored[name]) for name, stage in recipe.stages.items() if name in stored}
    except (InputError, OSError, KeyError, TypeError, AttributeError):
        return recipe
    return recipe.model_copy(update={"stages": {**recipe.stages, **before}})


def _read(file: Path) -> dict[str, Any]:
    try:
        if file.suffix == ".json" and file.is_file():  # of a run
            return read_as(file, _VALUES)
        values = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        others = sorted(f"recipes/{other.name}" for other in shipped("recipes").glob("*.yaml"))
        raise InputError(f"{file}: no such recipe; there are {listed(others)}") from None
    except IsADirectoryError:
        raise InputError(f"{file}: a directory; a recipe is a YAML file") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: not valid YAML: {single_line(error)}") from error
    if not isinstance(values, dict):
        raise InputError(f"{file}: a mapping of keys was expected, found {type(values).__name__}")
    return values


def _apply_override(values: dict[str, Any], override: str) -> None:
    """Put `a.b.c=value` into the nested mapping; mappings that are missing on the way are made."""
    path, separator, text = override.partition("=")
    if not separator or not path:
        raise InputError(f"{override!r}: an override looks like key.key=value")
    *parents, last = path.split(".")
    node: Any = values
    for depth, key in enumerate(parents):
        node = _child(node, key, ".".join(parents[: depth + 1]))
    try:
        value = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{override[:200]!r}: the value is not valid YAML: {single_line(error)}") from error
    if isinstance(node, list):
        node[_position(node, last, path)] = value
    else:
        node[last] = value


def _child(node: Any, key: str, path: str) -> Any:
    """The mapping or list at `key`; `path` is its full path, for the error."""
    if isinstance(node, list):
        child = node[_position(node, key, path)]
    else:
        child = node.setdefault(key, {})
        if child is None:  # `key:` without a value
            child = node[key] = {}
    if not isinstance(child, dict | list):
        raise InputError(f"override {path}: it is a value ({child!r}), so nothing can be set below it")
    return child


def _position(node: list[Any], key: str, path: str) -> int:
    if not key.isdigit() or int(key) >= len(node):
        raise InputError(f"override {path}: {key!r} is not a position of a list of {len(node)}")
    return int(key)
