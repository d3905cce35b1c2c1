"""pydantic's errors in a recipe as lines for the user: the path, what was found, what is allowed."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic_core import ErrorDetails

from models.kinds import KindTable
from models.spec import Config

MAX_SHOWN = 60
"""Characters of a found value that an error shows."""


def causes(errors: Sequence[ErrorDetails]) -> list[ErrorDetails]:
    """Those of a validation's errors that do not come from another: a list is too short without a wrong item."""
    places = [error["loc"] for error in errors]

    def has_inner(error: ErrorDetails) -> bool:
        own = error["loc"]
        return error["type"] == "too_short" and any(
            len(place) > len(own) and place[: len(own)] == own for place in places
        )

    return [error for error in errors if not has_inner(error)]


def explain(error: ErrorDetails, values: Mapping[str, Any], root: type[Config]) -> str:
    """One of pydantic's errors in one line, `path: what was found and what is allowed`.

    Args:
        error: an element of `ValidationError.errors()`; its types are listed in pydantic's docs, "Validation Errors".
        values: what was validated; the path is written with its keys.
        root: the class it was validated against; a misspelt key is compared with the keys of all classes below it.
    """
    path, siblings = _path(error["loc"], values)
    found = json.dumps(error["input"], default=str)
    found = found if len(found) <= MAX_SHOWN else found[: MAX_SHOWN - 3] + "..."
    match error["type"]:
        case "extra_forbidden":
            key, known = str(error["loc"][-1]), _known(root)
            near = nearest(key, known) or "; remove it or look for its name in docs/recipes.md"
            hint = "; it is one of another part: docs/recipes.md says where it belongs" if key in known else near
            return f"{path}: unknown key{hint}"
        case "missing":
            return f"{path}: missing; the keys given beside it are {listed(siblings)}"
        case "union_tag_invalid":
            allowed = error["ctx"]["expected_tags"].replace("'", "")
            return f"{path}.kind: found {error['ctx']['tag']!r}, allowed are {allowed}"
        case "union_tag_not_found":
            return f"{path}: found {found}, expected a mapping with a `kind`"
        case "value_error":  # raised by a validator of ours, which names the key below its own class
            return f"{path}: {error['ctx']['error']}" if path else str(error["ctx"]["error"])
    allowed = error["msg"][0].lower() + error["msg"][1:]
    if error["type"] == "too_short" and not error["ctx"]["actual_length"]:
        needed = error["ctx"]["min_length"]
        allowed = f"at least {needed} item{'s are' if needed > 1 else ' is'} needed"
    return f"{path}: found {found}; {allowed}"


def _path(location: Sequence[int | str], values: Any) -> tuple[str, list[str]]:
    """The keys of `location` that the user wrote (pydantic adds the tags of unions), and the keys next to the last."""
    written: list[str] = []
    node = values
    for index, key in enumerate(location):
        is_last = index == len(location) - 1
        is_written = (isinstance(node, dict) and key in node) or (isinstance(node, list) and isinstance(key, int))
        if is_written and not is_last:
            node = node[key]
        if is_written or is_last:
            written.append(str(key))
    return ".".join(written), [str(key) for key in node] if isinstance(node, dict) else []


def _known(root: type[Config]) -> list[str]:
    """Every field name of the configuration's classes, from which a misspelt key's suggestion is taken."""
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
    """The configuration classes that the fields of `model` may hold, those of a table of kinds among them."""
    found: set[type[Config]] = set()
    pending: list[Any] = [part for field in model.model_fields.values() for part in (field.annotation, *field.metadata)]
    while pending:
        annotation = pending.pop()
        if isinstance(annotation, type) and issubclass(annotation, Config):
            found.add(annotation)
        if isinstance(annotation, KindTable):
            found.update(annotation.loadable())
        pending += [*getattr(annotation, "__args__", ()), *getattr(annotation, "__metadata__", ())]
    return found


def listed(names: Sequence[str]) -> str:
    """Names with commas between them; `none` where there are none."""
    return ", ".join(names) if names else "none"


def nearest(name: str, names: Sequence[str]) -> str:
    """The one of `names` that a misspelt name may have been meant to be, as the end of a message."""
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
