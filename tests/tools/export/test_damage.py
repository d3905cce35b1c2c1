"""A damaged bundle or base is one line and exit 2 at every door, at once, however it is damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eval.run import main as evaluate
from models.common.errors import run_cli
from models.common.source import sha256_of
from tests.support.bundles import image, make_bundle, write_manifest
from tests.support.checkpoints import write_finished
from tests.support.damage import DOCUMENTS, MISSING, TENSORS
from tests.tools.conftest import run_of
from tools.export.merge import main as merge
from tools.export.quantize import main as quantize
from tools.serve.demo import main as demo
from trainer.checkpoint.initial_weights import base_digests
from trainer.config.recipe import Recipe


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("whole") / "bundle")


@pytest.fixture
def bundle(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "bundle"))


def _eval(bundle: Path, folder: Path) -> int:
    image("circle").save(folder / "1.png")
    (folder / "captions.json").write_text('[{"file_name": "1.png", "caption": "a circle"}]')
    words = [
        "--task",
        "caption",
        "--prompt",
        "Describe it.",
        "--captions",
        str(folder / "captions.json"),
        "--images",
        str(folder),
    ]
    return run_cli(evaluate, [str(bundle), *words, "--out", str(folder / "out.json"), "--device", "cpu"])


DOORS: dict[str, Callable[[Path, Path], int]] = {
    "demo": lambda bundle, _: run_cli(demo, [str(bundle), "--device", "cpu"]),
    "eval": _eval,
    "quantize": lambda bundle, folder: run_cli(quantize, [str(bundle), str(folder / "out"), "--to", "int8"]),
}


def refused(door: str, bundle: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The line that a door says; it must be the one line of an error, and exit 2."""
    capsys.readouterr()
    assert DOORS[door](bundle, folder) == 2
    said = capsys.readouterr().err
    assert said.count("error: ") == 1, said
    line = said[said.index("error: ") :].rstrip("\n")
    assert "\n" not in line
    assert "Traceback" not in said
    return line


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("damage", [*TENSORS, *MISSING])
def test_weights_that_cannot_be_the_model_s(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], door: str, damage: str
) -> None:
    {**TENSORS, **MISSING}[damage](bundle / "model.safetensors")
    assert "model.safetensors: changed since the bundle was made" in refused(door, bundle, tmp_path, capsys)
    write_manifest(bundle)  # as of one who damaged it on purpose
    assert str(bundle) in refused(door, bundle, tmp_path, capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "preprocessor_config.json", "processor_config.json"])
def test_documents_of_a_bundle(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], door: str, name: str
) -> None:
    if not (bundle / name).is_file():
        pytest.skip(f"this transformers writes no {name}")
    for case in ("cut", "a list", "deep", "deep within"):
        (bundle / name).write_text(DOCUMENTS[case])
        write_manifest(bundle)
        assert str(bundle) in refused(door, bundle, tmp_path, capsys), case


@pytest.mark.parametrize("case", DOCUMENTS)
def test_a_manifest_that_is_none(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    (bundle / "sightline.json").write_text(DOCUMENTS[case])
    for door in DOORS:
        assert str(bundle / "sightline.json") in refused(door, bundle, tmp_path, capsys)


@pytest.mark.parametrize("key", ["version", "files", "parity", "precision", "recipe"])
def test_a_manifest_with_a_key_missing_or_of_another_kind(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    manifest = json.loads((bundle / "sightline.json").read_text())
    for value in (None, 3, [], "x"):
        (bundle / "sightline.json").write_text(json.dumps({**manifest, key: value}))
        assert f"sightline.json: {key}" in refused("demo", bundle, tmp_path, capsys)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/b", ".."])
def test_a_manifest_and_an_index_name_files_of_the_bundle_alone(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    manifest = json.loads((bundle / "sightline.json").read_text())
    (bundle / "sightline.json").write_text(json.dumps({**manifest, "files": {name: "0" * 64}}))
    assert "sightline.json: files: " in refused("demo", bundle, tmp_path, capsys)
    (bundle / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    write_manifest(bundle)
    for door in DOORS:
        assert "model.safetensors.index.json: weight_map: " in refused(door, bundle, tmp_path, capsys)


def said_by_merge(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert run_cli(merge, words) == 2
    said = capsys.readouterr().err
    line = said[said.index("error: ") :].rstrip("\n")
    assert "\n" not in line
    assert "Traceback" not in said
    return line


def believe(recipe: dict[str, Any], checkpoint: Path) -> None:
    """Make a checkpoint say that it was trained with the bases as they are now."""
    state = json.loads((checkpoint / "state.json").read_text())
    state["base"] = base_digests(Recipe.model_validate_json(json.dumps(recipe)))
    (checkpoint / "state.json").write_text(json.dumps(state))
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    file = checkpoint / "state.json"
    manifest["files"]["state.json"] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("part", ["vision", "language"])
@pytest.mark.parametrize("damage", ["header of 2^60 bytes", "offsets outside", *MISSING])
def test_a_base_that_is_damaged_is_not_merged_into(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], part: str, damage: str
) -> None:
    recipe = run_of(tmp_path)
    run = write_finished(recipe, "lora")
    {**TENSORS, **MISSING}[damage](tmp_path / part / "model.safetensors")
    line = said_by_merge([str(run), str(tmp_path / "out"), "--stage", "lora"], capsys)
    assert str(tmp_path / part) in line
    assert "sha256" in line
    believe(recipe, run / "lora" / "checkpoints" / "step_000001")
    assert str(tmp_path / part) in said_by_merge([str(run), str(tmp_path / "out"), "--stage", "lora"], capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["../../secret", "/etc", "..", "a/b", "", "x" * 5000, "\ud83d"])
def test_latest_names_a_tag_of_its_checkpoint_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "latest").write_bytes(name.encode(errors="surrogatepass"))
    line = said_by_merge([str(tmp_path / "checkpoint"), str(tmp_path / "out")], capsys)
    assert str(tmp_path / "checkpoint") in line


def test_latest_names_no_link_to_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "latest").write_text("global_step1")
    (tmp_path / "checkpoint" / "global_step1").symlink_to(tmp_path / "elsewhere")
    line = said_by_merge([str(tmp_path / "checkpoint"), str(tmp_path / "out")], capsys)
    assert "a link that leads out of" in line


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x02]q\x00.", b"x" * 1000])
def test_a_pickle_that_is_none_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes) -> None:
    file = tmp_path / "checkpoint" / "mp_rank_00_model_states.pt"
    file.parent.mkdir()
    file.write_bytes(content)
    assert str(file.parent) in said_by_merge([str(file.parent), str(tmp_path / "out")], capsys)


@pytest.mark.parametrize("case", DOCUMENTS)
def test_a_run_whose_recipe_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    (tmp_path / "recipe.json").write_text(DOCUMENTS[case])
    assert str(tmp_path / "recipe.json") in said_by_merge([str(tmp_path), str(tmp_path / "out")], capsys)
