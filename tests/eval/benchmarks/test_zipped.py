"""Pictures in a zip archive are found and shown as those of a folder."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

from eval.benchmarks.zipped import find_zipped
from eval.tasks import make_task
from eval.tasks.config import BenchmarkConfig
from models.common.errors import InputError
from tests.support.benchmarks import COLOURS, Seer, TinyBenchmark


@pytest.fixture
def archive(tiny: TinyBenchmark) -> Path:
    path = tiny.folder / "images.zip"
    with zipfile.ZipFile(path, "w") as zipped:
        for image in sorted(tiny.images.iterdir()):
            zipped.write(image, f"mm-vet/images/{image.name}")
            zipped.writestr(f"__MACOSX/mm-vet/images/{image.name}", b"nothing")
    return path


def test_a_benchmark_asks_about_them_and_they_may_be_exchanged(tiny: TinyBenchmark, archive: Path) -> None:
    entry = {"question": "Which colour?", "answer": "red", "capability": ["rec"]}
    entries = {f"v1_{place}": {**entry, "imagename": f"images/scene_{place:012d}.png"} for place in range(len(COLOURS))}
    file = tiny.folder / "mm-vet.json"
    file.write_text(json.dumps(entries))
    config = BenchmarkConfig(benchmark="mmvet", questions=(str(file),), images=archive)
    folder = config.model_copy(update={"images": tiny.images.parent / "mm-vet"})
    assert make_task(config).ask(Seer(), 3, range(3), progress=False) == list(COLOURS)
    with zipfile.ZipFile(archive) as zipped:
        zipped.extractall(tiny.folder)
    assert make_task(config).asked() == make_task(folder).asked()
    other = make_task(config.model_copy(update={"shuffle_pictures": True}))
    assert sorted(other.ask(Seer(), 3, range(3), progress=False)) == sorted(COLOURS)


def test_ids_names_and_what_is_missing(archive: Path) -> None:
    by_id, by_number, by_name = find_zipped(
        archive, [("scene_000000000001", None), (1, None), (0, "scene_000000000001.png")]
    )
    assert by_id == by_number == by_name
    with pytest.raises(InputError, match="lacks 1 of 2 images, the first is 7"):
        find_zipped(archive, [(7, None), (0, None)])
    with zipfile.ZipFile(archive, "a") as zipped:
        zipped.writestr("more/scene_000000000001.png", b"")
    with pytest.raises(InputError, match="both mm-vet/images"):
        find_zipped(archive.rename(archive.with_name("more.zip")), [(1, None)])
    with pytest.raises(InputError, match="no such archive"):
        find_zipped(archive.with_name("none.zip"), [(1, None)])
    archive.with_name("bad.zip").write_bytes(b"nothing")
    with pytest.raises(InputError, match="can't be read"):
        find_zipped(archive.with_name("bad.zip"), [(1, None)])
