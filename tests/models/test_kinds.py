"""Tables of kinds: ours, those of packages, and the errors when one is missing, doubled or broken."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import ValidationError

from models.common.errors import InputError
from models.kinds import KindTable
from models.spec import Config
from tests.support.outside import write_entry_points
from tests.support.paths import REPOSITORY


class Shape(Config):
    """What the kinds of the table below derive from."""

    kind: str


class Circle(Shape):
    kind: Literal["circle"] = "circle"
    radius: float = 1.0
    corners: tuple[int, ...] = ()


class NoShape(Config):
    kind: str


def table() -> KindTable[Shape]:
    """A new one each time, since a table looks for packages once."""
    return KindTable("sightline.test_shapes", Shape, {"circle": f"{__name__}:Circle"})


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of packages on this process's import path."""
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def add(site: Path, package: str, kind: str, target: str) -> None:
    write_entry_points(site, package, {"sightline.test_shapes": {kind: target}})


class Drawing(Config):
    shape: Annotated[Shape, table()]


def test_a_field_is_decoded_by_its_kind_and_written_as_its_own_class_writes_it() -> None:
    drawing = Drawing.model_validate_json('{"shape": {"kind": "circle", "radius": 2, "corners": [1]}}')
    assert drawing.shape == Circle(radius=2.0, corners=(1,))
    assert Drawing.model_validate_json(drawing.model_dump_json()) == drawing
    assert drawing.model_dump(mode="json") == {"shape": {"kind": "circle", "radius": 2.0, "corners": [1]}}
    assert Drawing(shape=Circle()) == Drawing.model_validate({"shape": {"kind": "circle"}})
    assert Drawing(shape=Circle()) != drawing


@pytest.mark.parametrize(
    ("values", "fault", "where"),
    [
        ({"kind": "circel"}, "union_tag_invalid", ("shape",)),
        ({"radius": 2.0}, "union_tag_not_found", ("shape",)),
        ("circle", "union_tag_not_found", ("shape",)),
        ({"kind": "circle", "radios": 2.0}, "extra_forbidden", ("shape", "radios")),
        ({"kind": "circle", "radius": "2"}, "float_type", ("shape", "radius")),
    ],
)
def test_what_is_wrong_is_told_as_pydantic_tells_it(values: Any, fault: str, where: tuple[str, ...]) -> None:
    with pytest.raises(ValidationError) as caught:
        Drawing.model_validate_json(json.dumps({"shape": values}))
    (found,) = caught.value.errors()
    assert (found["type"], found["loc"]) == (fault, where)


def test_a_package_adds_a_kind_which_is_imported_when_it_is_asked_for(site: Path) -> None:
    add(site, "more-shapes", "square", "more_shapes:Square")
    found = table()
    assert found.kinds() == ["circle", "square"]
    assert (found.package("circle"), found.package("square")) == (None, "more-shapes")
    (site / "more_shapes.py").write_text(
        f"from typing import Literal\nfrom {__name__} import Shape\n"
        "class Square(Shape):\n    kind: Literal['square'] = 'square'\n    side: int\n"
    )
    square = found.decode({"kind": "square", "side": 3})
    assert square.model_dump() == {"kind": "square", "side": 3}


def test_a_kind_that_two_packages_claim_names_both(site: Path) -> None:
    add(site, "first-shapes", "square", "first:Square")
    add(site, "second-shapes", "square", "second:Square")
    with pytest.raises(InputError) as caught:
        table().kinds()
    assert all(word in str(caught.value) for word in ("square", "first-shapes", "second-shapes", "uninstall"))


def test_a_kind_of_ours_is_not_replaced(site: Path) -> None:
    add(site, "other-shapes", "circle", "other:Circle")
    with pytest.raises(InputError, match=r"circle is claimed twice, by sightline .* and by other-shapes"):
        table().find("circle")


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("nowhere_to_be_found:Square", "broken-shapes, which does not load (ModuleNotFoundError"),
        (f"{__name__}:Missing", "broken-shapes, which does not load (AttributeError"),
        (f"{__name__}:NoShape", f"which does not derive from {__name__}.Shape"),
    ],
)
def test_a_broken_package_is_named_when_its_kind_is_asked_for(site: Path, target: str, words: str) -> None:
    add(site, "broken-shapes", "square", target)
    found = table()
    assert found.find("circle") is Circle
    assert found.loadable() == [Circle]
    with pytest.raises(InputError) as caught:
        found.find("square")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_kind_says_which_package_brings_it() -> None:
    with pytest.raises(InputError, match=r"'square' of sightline.test_shapes .*install more-shapes"):
        table().decode({"kind": "square"}, "more-shapes")


def test_configurations_load_without_torch() -> None:
    modules = "models.config, models.shapes, models.kinds, trainer.config.schema, trainer.config.recipe"
    code = f"import sys, {modules}; print([n for n in ('torch', 'transformers') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
