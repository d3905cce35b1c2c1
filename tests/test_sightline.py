"""The module that users import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import sightline
from tests.support.bundles import image, make_bundle
from tests.support.paths import REPOSITORY


def test_a_bundle_is_loaded_and_asked_in_two_lines(tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "bundle")
    image("circle").save(tmp_path / "photo.jpg")
    model = sightline.load(folder, device="cpu")
    answer = model.chat(str(tmp_path / "photo.jpg"), "What is in the image?", max_new_tokens=8)
    assert isinstance(answer, str)
    query = sightline.Query((image("circle"),), (sightline.Turn("user", "What is in the image?"),))
    assert len(model.answer([query], sightline.Decoding(max_new_tokens=8))) == 1


def test_every_name_is_there_and_no_other() -> None:
    for name in sightline.__all__:
        assert getattr(sightline, name) is not None
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = sightline.nothing_of_the_kind


def test_a_missing_bundle_is_an_input_error() -> None:
    with pytest.raises(sightline.InputError, match="nowhere"):
        sightline.load("nowhere")


@pytest.mark.slow
@pytest.mark.parametrize("first", ["transformers", "trainer.build", "eval.predictor"])
def test_register_makes_our_class_known_whoever_brings_transformers_in(first: str) -> None:
    code = (
        f"import sightline, {first}\nsightline.register()\nsightline.register()\nfrom transformers import AutoConfig\n"
        "print(type(AutoConfig.for_model('sightline')).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.stdout.split()[-1:] == ["SightlineConfig"], done.stderr  # DeepSpeed may have said something before


def test_importing_it_loads_no_heavy_library() -> None:
    code = "import sys, sightline; print([n for n in ('torch', 'transformers', 'PIL', 'numpy') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
