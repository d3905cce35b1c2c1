"""What pydantic found wrong with a recipe, in words a person can act on: the path, what was found, what is allowed."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from typing import Any

from models.spec import Config


def explain(fault: Any, values: dict[str, Any], root: type[Config]) -> str:
    """One fault of pydantic's list as `path: what was found and what is allowed`."""
    path, siblings = _path(fault["loc"], values)
    found = json.dumps(fault["input"], default=str)
    found = found if len(found) <= 60 else found[:57] + "..."
    match fault["type"]:
        case "extra_forbidden":
            close = difflib.get_close_matches(str(fault["loc"][-1]), _known(root), n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "; remove it or look for its name in docs/recipes.md"
            return f"{path}: unknown key{hint}"
        case "missing":
            return f"{path}: missing; the keys given beside it are {listed(siblings)}"
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
        known = (isinstance(place, dict) and key in place) or (isinstance(place, list) and isinstance(key, int))
        if known and not last:
            place = place[key]
        if known or last:
            written.append(str(key))
    return ".".join(written), [str(key) for key in place] if isinstance(place, dict) else []


def _known(root: type[Config]) -> list[str]:
    """Every field name of the configuration's classes: what an unknown key may have been meant to be."""
    names: set[str] = set()
    pending: list[type[Config]] = [root]
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


def listed(names: Sequence[str]) -> str:
    """Names in a row, or `none`."""
    return ", ".join(names) if names else "none"
