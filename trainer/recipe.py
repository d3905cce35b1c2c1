"""Recipes: YAML -> one frozen `Recipe`, with `key=value` overrides and errors a person can act on.

recipes/X.yaml --read--> dict --overrides--> dict --pydantic, strict--> Recipe
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, model_validator

from models.config import ModelConfig
from models.errors import InputError
from models.spec import Config
from trainer.config import StageConfig, TrackingConfig


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
                raise ValueError(f"stages.{name}.init: {stage.init!r} is not a stage above it ({_listed(earlier)})")
            earlier.append(name)
        return self

    def stage(self, name: str) -> StageConfig:
        """The stage called `name`; raises InputError that lists the stages there are."""
        if name not in self.stages:
            raise InputError(f"--stage {name}: {self.name} has no such stage; it has {_listed(list(self.stages))}")
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
        raise InputError(f"{file}: " + "; ".join(_explain(fault, values) for fault in error.errors())) from error


def _read(file: Path) -> dict[str, Any]:
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        others = sorted(str(other) for other in Path("recipes").glob("*.yaml"))
        raise InputError(f"{file}: no such recipe; there are {_listed(others)}") from None
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


def _explain(fault: Any, values: dict[str, Any]) -> str:
    """One fault of pydantic's list as `path: what was found and what is allowed`."""
    path, siblings = _path(fault["loc"], values)
    found = json.dumps(fault["input"], default=str)
    found = found if len(found) <= 60 else found[:57] + "..."
    match fault["type"]:
        case "extra_forbidden":
            close = difflib.get_close_matches(str(fault["loc"][-1]), _known(fault["loc"], values), n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "; remove it or look for its name in docs/recipes.md"
            return f"{path}: unknown key{hint}"
        case "missing":
            return f"{path}: missing; the keys given beside it are {_listed(siblings)}"
        case "union_tag_invalid":
            allowed = fault["ctx"]["expected_tags"].replace("'", "")
            return f"{path}.kind: found {fault['ctx']['tag']!r}, allowed are {allowed}"
        case "union_tag_not_found":
            return f"{path}: found {found}, expected a mapping with a `kind`"
        case "value_error":
            return str(fault["ctx"]["error"])
    return f"{path}: found {found}; {fault['msg'][0].lower()}{fault['msg'][1:]}"


def _path(location: Sequence[int | str], values: Any) -> tuple[str, list[str]]:
    """The keys of `location` that a person wrote (pydantic adds the tags of unions), and the keys beside the last."""
    written: list[str] = []
    place = values
    for index, key in enumerate(location):
        last = index == len(location) - 1
        known = isinstance(place, dict) and key in place or isinstance(place, list) and isinstance(key, int)
        if known and not last:
            place = place[key]
        if known or last:
            written.append(str(key))
    return ".".join(written), [str(key) for key in place] if isinstance(place, dict) else []


def _known(location: Sequence[int | str], values: dict[str, Any]) -> list[str]:
    """Every field name of the recipe's classes: what an unknown key may have been meant to be."""
    names: set[str] = set()
    pending: list[type[Config]] = [Recipe]
    seen: set[type[Config]] = set()
    while pending:
        model = pending.pop()
        seen.add(model)
        names.update(model.model_fields)
        pending += [kind for kind in _models_in(model) if kind not in seen]
    return sorted(names)


def _models_in(model: type[Config]) -> set[type[Config]]:
    """The configuration classes that the fields of `model` may hold."""
    found: set[type[Config]] = set()
    pending: list[Any] = [field.annotation for field in model.model_fields.values()]
    while pending:
        annotation = pending.pop()
        if isinstance(annotation, type) and issubclass(annotation, Config):
            found.add(annotation)
        pending += getattr(annotation, "__args__", ())
    return found


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if names else "none"
