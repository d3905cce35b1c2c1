"""The registry of component kinds: ours in a table, those of other packages by entry points. Loads without torch.

    recipe: {kind: mlp, ...} --kind--> "models.projectors.mlp:MlpProjector" --import--> the class --pydantic--> a value

A part's class is its configuration: it builds the part, and gives its cost and its form in a bundle. Its file
is imported when a recipe names its kind, and not before. A package brings a part in the same format, as an entry point:

    [project.entry-points."sightline.projectors"]
    gated = "its_package.gated:GatedProjector"
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from pydantic import GetCoreSchemaHandler, ValidationInfo
from pydantic_core import PydanticCustomError, PydanticKnownError, core_schema

from models.common.errors import InputError
from models.spec import Config

PartT = TypeVar("PartT", bound=Config)


class KindTable(Generic[PartT]):
    """The kinds of one part of a recipe. As an annotation of a pydantic field it decodes the field by its `kind`.

    Args:
        group: the entry points by which other packages add kinds, such as "sightline.projectors".
        base: what every class of the table derives from.
        own: kind -> "module:Class" of this project.
    """

    def __init__(self, group: str, base: type[PartT], own: Mapping[str, str]) -> None:
        self.group = group
        self._base = base
        self._own = dict(own)

    @cached_property
    def _points(self) -> dict[str, EntryPoint]:
        """The entry points of installed packages, by kind."""
        found: dict[str, EntryPoint] = {}
        for point in entry_points(group=self.group):  # a scan of all packages, some tens of milliseconds
            taken = self._own.get(point.name) or (found[point.name].value if point.name in found else point.value)
            if taken != point.value:
                other = "sightline" if point.name in self._own else _package(found[point.name])
                raise InputError(
                    f"{self.group}: {point.name} is claimed twice, by {other} ({taken}) and by {_package(point)}"
                    f" ({point.value}); uninstall one of them, or rename its kind"
                )
            if point.name not in self._own:
                found[point.name] = point
        return found

    def kinds(self) -> list[str]:
        """Every kind, ours first. Raises InputError where two packages claim the same one."""
        return [*self._own, *sorted(self._points)]

    def package(self, kind: str) -> str | None:
        """The package that brings a kind; None where it is one of ours."""
        return None if kind in self._own else _package(self._points[kind])

    def find(self, kind: str, package: str | None = None) -> type[PartT]:
        """The class of a kind, imported now. `package` is where it came from, for the error message.

        Raises InputError where no installed package has it, or where the package that claims it cannot give it.
        """
        if kind not in self.kinds():
            raise InputError(
                f"no package that is installed has {kind!r} of {self.group} (there are {', '.join(self.kinds())});"
                f" install {package or 'the package that brings it'}"
            )
        if kind in self._own:
            return self._checked(kind, self._own[kind], _load(self._own[kind]))
        point = self._points[kind]
        try:
            found = _load(point.value)
        except Exception as error:  # whatever another package's module raises at import
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise InputError(
                f"{self.group}: {kind} is {point.value} of {_package(point)}, which does not load ({reason}); fix or"
                " uninstall that package"
            ) from error
        return self._checked(kind, point.value, found)

    def _checked(self, kind: str, target: str, found: Any) -> type[PartT]:
        if not (isinstance(found, type) and issubclass(found, self._base)):
            base = f"{self._base.__module__}.{self._base.__name__}"
            raise InputError(f"{self.group}: {kind} is {target}, which does not derive from {base}")
        return found

    def decode(self, values: Mapping[str, Any], package: str | None = None) -> PartT:
        """The part that `values`, as in JSON, describe; raises InputError as `find` does."""
        # Through JSON: a file's lists were tuples, which strict decoding of Python values would refuse.
        return self.find(str(values["kind"]), package).model_validate_json(json.dumps(values))

    def loadable(self) -> list[type[PartT]]:
        """Every class that can be imported here; those that fail to load are left out."""
        found = []
        for kind in self.kinds():
            try:
                found.append(self.find(kind))
            except InputError:
                continue
        return found

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        """How pydantic decodes a field with this annotation; values are serialized by their own class."""
        del source, handler
        return core_schema.with_info_plain_validator_function(self._validate)

    def _validate(self, value: Any, info: ValidationInfo) -> PartT:
        """Errors are those of pydantic's own tagged unions, without the tag in their path."""
        if isinstance(value, self._base):
            return value
        if not isinstance(value, Mapping) or "kind" not in value:
            raise PydanticKnownError("union_tag_not_found", {"discriminator": "'kind'"})
        kind = str(value["kind"])
        try:
            if kind not in self.kinds():
                tags = ", ".join(f"'{tag}'" for tag in self.kinds())
                raise PydanticKnownError(
                    "union_tag_invalid", {"discriminator": "'kind'", "tag": kind, "expected_tags": tags}
                )
            chosen = self.find(kind)
        except InputError as error:
            raise PydanticCustomError("part", "{reason}", {"reason": str(error)}) from error
        return chosen.model_validate_json(json.dumps(value)) if info.mode == "json" else chosen.model_validate(value)


def _load(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else "a package without a name"
