"""Recipes: YAML -> one frozen `Recipe`, with `key=value` overrides and errors a person can act on.

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

from models.config import ModelConfig, QFormerProjector
from models.errors import InputError
from models.spec import Config
from trainer.config import MultiToken, StageConfig, TrackingConfig
from trainer.recipe_faults import explain, listed


class Recipe(Config):
    """A model family and the stages that train it. Everything a run does follows from this value."""

    name: str
    run: str
    """The directory that everything a run makes goes into."""
    seed: int = 0
    model: ModelConfig
    stages: dict[str, StageConfig] = Field(min_length=1)
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _stages_start_from_earlier_ones(self) -> Recipe:
        earlier: list[str] = []
        for name, stage in self.stages.items():
            if stage.init is not None and stage.init not in earlier:
                raise ValueError(f"stages.{name}.init: {stage.init!r} is not a stage above it ({listed(earlier)})")
            earlier.append(name)
        return self

    @model_validator(mode="after")
    def _objectives_find_the_parts_they_teach(self) -> Recipe:
        for name, stage in self.stages.items():
            if isinstance(stage.objective, MultiToken) and self.model.future is None:
                raise ValueError(
                    f"stages.{name}.objective: multi_token teaches the heads of model.future, and there are none;"
                    " set it, say to {kind: parallel, num_tokens: 4}"
                )
            if stage.objective.reader == "projector" and not isinstance(self.model.projector, QFormerProjector):
                raise ValueError(
                    f"stages.{name}.objective: {stage.objective.kind} teaches a projector that reads text, and"
                    f" model.projector.kind is {self.model.projector.kind}; set it to qformer"
                )
        return self

    def stage(self, name: str) -> StageConfig:
        """The stage called `name`; raises InputError that lists the stages there are."""
        if name not in self.stages:
            raise InputError(f"--stage {name}: {self.name} has no such stage; it has {listed(list(self.stages))}")
        return self.stages[name]


class _Loader(yaml.SafeLoader):
    """YAML whose numbers are those of YAML 1.2: `1e-3` is a number here, not a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"),
    list("-+0123456789."),
)
# Integers match the expression above too; YAML takes the first resolver in the list, so theirs goes before it.
for _first in "-+0123456789":
    _resolvers = _Loader.yaml_implicit_resolvers[_first]
    _resolvers.sort(key=lambda pair: pair[0] != "tag:yaml.org,2002:int")


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, with `a.b.c=value` overrides; raises InputError with one line for each fault."""
    file = Path(path)
    values = _read(file)
    for override in overrides:
        _apply(values, override)
    try:
        # Strict decoding from JSON: a list may stand for a tuple and an int for a float, and nothing else is coerced.
        return Recipe.model_validate_json(json.dumps(values))
    except ValidationError as error:
        raise InputError(f"{file}: " + "; ".join(explain(fault, values, Recipe) for fault in error.errors())) from error


def _read(file: Path) -> dict[str, Any]:
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        others = sorted(str(other) for other in Path("recipes").glob("*.yaml"))
        raise InputError(f"{file}: no such recipe; there are {listed(others)}") from None
    except IsADirectoryError:
        raise InputError(f"{file}: a directory; a recipe is a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise InputError(f"{file}: a mapping of keys was expected, found {type(values).__name__}")
    return values


def _apply(values: dict[str, Any], override: str) -> None:
    """Put `a.b.c=value` into the nested mapping; the value is read as YAML."""
    path, separator, text = override.partition("=")
    if not separator or not path:
        raise InputError(f"{override!r}: an override looks like key.key=value")
    *parents, last = path.split(".")
    place: Any = values
    for depth, key in enumerate(parents):
        place = _child(place, key, ".".join(parents[: depth + 1]))
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise InputError(f"{override!r}: the value is not valid YAML: {' '.join(str(error).split())}") from error
    if isinstance(place, list):
        place[_position(place, last, path)] = value
    else:
        place[last] = value


def _child(place: Any, key: str, path: str) -> Any:
    if isinstance(place, list):
        return place[_position(place, key, path)]
    child = place.setdefault(key, {})
    if child is None:
        child = place[key] = {}
    if not isinstance(child, dict | list):
        raise InputError(f"override {path}: it is a value ({child!r}), so nothing can be set below it")
    return child


def _position(place: list[Any], key: str, path: str) -> int:
    if not key.isdigit() or int(key) >= len(place):
        raise InputError(f"override {path}: {key!r} is not a position of a list of {len(place)}")
    return int(key)
