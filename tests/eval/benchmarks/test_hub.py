"""Every benchmark from a parquet file with the columns that its table has on the hub (lmms-eval's task sources)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from eval.benchmarks.rows import rows_of
from eval.benchmarks.scoring import clusters_of
from eval.benchmarks.spec import load, names
from eval.caption_metrics import score
from eval.tasks import make_task
from eval.tasks.config import BenchmarkConfig
from tests.support.hub_tables import ELSEWHERE, HUB, LIME, RED, Table


def write(path: Path, rows: Table) -> str:
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), path)
    return str(path)


def test_every_benchmark_has_its_table_here() -> None:
    assert {*HUB, "mmmu_val_seed42"} == {*names()} - ELSEWHERE


@pytest.mark.parametrize("name", [*HUB, "mmmu_val_seed42"])
def test_the_hubs_table_is_asked_and_scored(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")  # captions are scored without Java, which takes ten seconds to start
    rows, answers = HUB["mmmu_val" if name == "mmmu_val_seed42" else name]
    images = None
    if name == "gqa":
        images = tmp_path / "testdev_balanced_images.parquet"
        write(images, [{"id": "n161313", "image": RED}, {"id": "n7", "image": LIME}])
    file = write(tmp_path / "test.parquet", rows)
    task: Any = make_task(BenchmarkConfig(benchmark=name, questions=(file,), images=images))
    shown = [None if picture is None else picture.read() for picture in task.pictures]
    assert shown == [None if image is None else image["bytes"] for image in pictures_of(name, rows)]
    result = task.score(answers)
    if load(name).is_judged:
        assert [sample["answer"] for sample in result.samples] == list(answers)
    else:
        assert result.metrics[load(name).headline] == BEST.get(name, 100.0)
    assert all(value is not None for value in result.details.get("groups", {}).values())


BEST = {
    "mme": None,  # perception has ten categories, and here is one
    "coco_captions": pytest.approx(10.0),
    "flickr30k_captions": pytest.approx(10.0),
    "nocaps_captions": pytest.approx(10.0),
    "ocrbench": 2.0,
    "pope": 1.0,
    "refcoco": 50.0,
}


def pictures_of(name: str, rows: Table) -> list[Any]:
    """What each row shows: a video its middle frame, and RefCOCO its picture for each of two sentences."""
    found = [row.get("decoded_image", row.get("image", row.get("image_1", RED))) for row in rows]
    found = [each[len(each) // 2] if isinstance(each, list) else each for each in found]
    return found * 2 if name == "refcoco" else found


def asked(name: str, tmp_path: Path) -> Any:
    return make_task(BenchmarkConfig(benchmark=name, questions=(write(tmp_path / "t.parquet", HUB[name][0]),)))


def test_mmes_pairs_are_the_questions_of_one_picture(tmp_path: Path) -> None:
    task = asked("mme", tmp_path)
    groups = task.score(["Yes", "No", "Yes", "Yes"]).details["groups"]
    assert groups["accuracy_plus/code_reasoning"] == 100.0
    assert groups["accuracy/existence"] == 50.0
    assert groups["accuracy_plus/existence"] == 0.0
    assert groups["score/code_reasoning"] == 200.0


def test_rows_of_one_picture_are_drawn_together(tmp_path: Path) -> None:
    """The hub repeats a picture in each of its rows; in POPE six questions show the same."""
    task = asked("pope", tmp_path)
    assert len(set(clusters_of(load("pope"), task._rows.rows))) == 1
    assert task.score(HUB["pope"][1]).details["num_clusters"] == 1


def test_groups_are_the_published_ones(tmp_path: Path) -> None:
    assert set(asked("chartqa", tmp_path).score(["14", "7"]).details["groups"]) == {
        "accuracy/human_test",
        "accuracy/augmented_test",
    }
    rows, answers = HUB["gqa"]
    images = tmp_path / "images"
    images.mkdir()
    write(images / "a.parquet", [{"id": "n161313", "image": RED}])
    file = write(tmp_path / "gqa.parquet", rows)
    task = make_task(BenchmarkConfig(benchmark="gqa", questions=(file,), images=images))
    assert set(task.score(answers).details["groups"]) == {"accuracy/verify", "accuracy/global"}


def test_mmbenchs_empty_fields_are_not_asked(tmp_path: Path) -> None:
    assert asked("mmbench_dev", tmp_path).prompt_of(0) == (
        "?\nA. x\nB. y\nAnswer with the option's letter from the given choices directly."
    )


def test_nocaps_has_figures_of_each_domain_as_sets_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    texts = [
        "a red square is here",
        "one wide green circle there",
        "two small dogs run away",
        "the old boat lies still",
    ]
    domains = ["in-domain", "in-domain", "out-domain", "out-domain"]
    images = [{"id": place, "file_name": f"{place}.png", "domain": domain} for place, domain in enumerate(domains)]
    annotations = [{"image_id": place, "caption": text} for place, text in enumerate(texts)]
    path = tmp_path / "nocaps_val_4500_captions.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    for place in range(4):
        Image.new("RGB", (16, 16), (place, 0, 0)).save(tmp_path / f"{place}.png")
    task = make_task(BenchmarkConfig(benchmark="nocaps_captions", questions=(str(path),), images=tmp_path))
    result = task.score([*texts[:2], "nothing of it", "nor of that"])
    groups = result.details["groups"]
    assert groups["CIDEr/in-domain"] == pytest.approx(10.0)
    assert groups["CIDEr/out-domain"] == pytest.approx(0.0, abs=1e-6)
    alone = score(dict(enumerate([[text] for text in texts[:2]])), dict(enumerate(texts[:2])))  # type: ignore[arg-type]
    assert groups["BLEU-4/in-domain"] == alone.metrics["BLEU-4"]
    assert result.metrics["CIDEr"] == pytest.approx(5.0, abs=0.01)
    again = rows_of(load("nocaps_captions"), [sample["row"] for sample in result.samples], "samples", {})
    assert [row.truth for row in again.rows] == [[text] for text in texts]
