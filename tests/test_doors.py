"""Whatever comes in, through whichever door: all of them say the same of it, in one line that names it."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_pipeline.images import has_heic
from data_pipeline.index import ShardIndex
from data_pipeline.index_build import build_index
from eval.evaluation import Opened, evaluate
from eval.predictor import Decoding, Predictor
from eval.tasks import make_task
from eval.tasks.config import YesNoConfig
from models.common.errors import InputError, run_cli
from models.spec import IMAGE_TOKEN
from tests.support.bundles import make_bundle
from tests.support.odd_inputs import EMPTY_ANSWERS, FEW_TEXTS, MANY_TEXTS, Odd, few_images, heic_images, many_images
from tests.support.published import make_published
from tests.support.shards import caption_sample, image_bytes, write_tar
from tests.support.streams import config, keys_left, open_rank
from tools.serve.chat import Chat, reply
from tools.serve.images import check_image, keep, showable
from tools.shards.__main__ import main as shards

SHORT = Decoding(max_new_tokens=1)
Doors = dict[str, Callable[[], str]]
"""What each says: why it does not take the input, or nothing where it does."""


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    return Predictor.open(make_bundle(tmp_path_factory.mktemp("doors") / "bundle"), device="cpu")


def say_the_same(odd: Odd, doors: Doors) -> None:
    """Every door takes the input or none does, and who does not says why in one line."""
    said = {name: _said(door) for name, door in doors.items()}
    taken = {name: not reason for name, reason in said.items()}
    is_used = odd.is_used if odd.is_used is not None else next(iter(taken.values()))
    assert taken == dict.fromkeys(taken, is_used), (odd.name, said)
    for name, reason in said.items():
        assert "\n" not in reason, (odd.name, name, reason)
        assert len(reason) < 1500, (odd.name, name, reason)


def _said(door: Callable[[], str]) -> str:
    try:
        return door().strip()
    except InputError as error:
        return str(error)


def made(folder: Path, capsys: pytest.CaptureFixture[str], kind: str, row: dict[str, Any]) -> str:
    """Through `make`; what it takes `check` must call good."""
    (folder / "table.json").write_text(json.dumps([row]))
    out, images = folder / "made", folder / "images"
    words = [str(out), kind, str(folder / "table.json"), "--images", str(images), "--quiet", "--jobs", "1"]
    capsys.readouterr()
    if run_cli(shards, ["make", *words]):
        assert not out.exists()
        return str(capsys.readouterr().err)
    assert run_cli(shards, ["check", str(out), "--quiet", "--jobs", "1"]) == 0
    return ""


def tar_doors(folder: Path, files: dict[str, bytes], capsys: pytest.CaptureFixture[str]) -> Doors:
    """Through a tar: `index` (with `check` behind it, which decodes) and the training stream."""
    tars = folder / "tars"
    tars.mkdir()
    write_tar(tars / "a.tar", [("good", caption_sample(1)), ("odd", files)])
    build_index(tars, bad_share_limit=1.0)
    left_out = {line["key"]: line["reason"] for line in ShardIndex.open(tars).left_out()}
    assert set(left_out) <= {"odd"}

    def check() -> str:
        capsys.readouterr()
        code = run_cli(shards, ["check", str(tars), "--quiet", "--jobs", "1"])
        lines = capsys.readouterr().out.strip()
        assert code == bool(lines)
        assert not lines or lines.startswith("a.tar\todd\t")
        assert bool(lines) or "odd" not in left_out
        return str(lines)

    def stream() -> str:
        quarantine = folder / "quarantine.jsonl"
        opened = open_rank(config(tars, bad_share_limit=1.0, max_length=400), num_slots=1, quarantine=quarantine)
        keys = keys_left(opened)
        assert "good" in keys
        if "odd" in keys:
            return ""
        return left_out.get("odd") or str(json.loads(quarantine.read_text())["reason"])

    return {"check": check, "stream": stream}


def asked(folder: Path, predictor: Predictor, image: str, question: str) -> str:
    """Through an evaluation."""
    (folder / "questions.json").write_text(json.dumps([{"image": image, "text": question, "label": "yes"}]))
    task = make_task(YesNoConfig(images=folder / "images", questions=folder / "questions.json", max_new_tokens=1))
    opened = Opened(lambda: predictor, lambda _: {})
    evaluate(opened, [task], folder / "scores.json", model=str(folder / "images"), batch_size=1)
    return ""


def shown(folder: Path, image: Path) -> str:
    """Through the page: an upload, and bytes from an address."""
    check_image(image)
    (folder / "kept").mkdir()
    showable(image, folder / "kept")
    keep(image.read_bytes(), folder / "kept")
    return ""


def talked(predictor: Predictor, question: str) -> str:
    """Through the page's chat."""
    updates = list(reply(predictor, Chat().asked(None, question), SHORT))
    return updates[-1].error


def image_doors(folder: Path, odd: Odd, predictor: Predictor, capsys: pytest.CaptureFixture[str]) -> Doors:
    (folder / "images").mkdir()
    image, row = folder / "images" / odd.name, {"file_name": odd.name, "caption": "Noise."}
    image.write_bytes(odd.content)
    return {
        "make": lambda: made(folder, capsys, "--captions", row),
        **tar_doors(folder, {odd.name.rpartition(".")[2]: odd.content, "txt": b"Noise."}, capsys),
        "eval": lambda: asked(folder, predictor, odd.name, "Noise?"),
        "chat": lambda: predictor.chat(image, "Noise?", max_new_tokens=1)[:0],
        "chat about bytes": lambda: predictor.chat(odd.content, "Noise?", max_new_tokens=1)[:0],
        "page": lambda: shown(folder, image),
    }


def question_doors(folder: Path, odd: Odd, predictor: Predictor, capsys: pytest.CaptureFixture[str]) -> Doors:
    (folder / "images").mkdir()
    (folder / "images" / "a.png").write_bytes(image_bytes())
    chat = [{"from": "human", "value": f"{IMAGE_TOKEN}\n{odd.content}"}, {"from": "gpt", "value": "Yes."}]
    row = {"image": "a.png", "conversations": chat}
    return {
        "make": lambda: made(folder, capsys, "--llava", row),
        **tar_doors(folder, {"png": image_bytes(), "json": json.dumps({"conversations": chat}).encode()}, capsys),
        "eval": lambda: asked(folder, predictor, "a.png", odd.content),
        "chat": lambda: predictor.chat(image_bytes(), odd.content, max_new_tokens=1)[:0],
        "page": lambda: talked(predictor, odd.content),
    }


def answer_doors(folder: Path, odd: Odd, capsys: pytest.CaptureFixture[str]) -> Doors:
    (folder / "images").mkdir()
    (folder / "images" / "a.png").write_bytes(image_bytes())
    row, record = {"file_name": "a.png", "caption": odd.content}, {"text": odd.content}
    return {
        "make": lambda: made(folder, capsys, "--captions", row),
        **tar_doors(folder, {"png": image_bytes(), "json": json.dumps(record).encode()}, capsys),
    }


def each(odds: Iterable[Odd], tmp_path: Path, doors: Callable[[Path, Odd], Doors]) -> None:
    for odd in odds:
        with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
            say_the_same(odd, doors(Path(folder), odd))


def test_odd_images(predictor: Predictor, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    each(few_images(0), tmp_path, lambda folder, odd: image_doors(folder, odd, predictor, capsys))


def test_heic_images_where_there_is_a_decoder(
    predictor: Predictor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Read once with pillow-heif 1.8.1, by every door. Without it, `phone.heic` above is refused by all of them."""
    pytest.importorskip("pillow_heif", reason="HEIC needs pillow-heif (the extra `heic`)")
    assert has_heic()
    each(heic_images(0), tmp_path, lambda folder, odd: image_doors(folder, odd, predictor, capsys))


def test_odd_questions(predictor: Predictor, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    each(FEW_TEXTS, tmp_path, lambda folder, odd: question_doors(folder, odd, predictor, capsys))


def test_odd_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    each([*FEW_TEXTS, *EMPTY_ANSWERS], tmp_path, lambda folder, odd: answer_doors(folder, odd, capsys))


@pytest.mark.slow
def test_many_odd_images(predictor: Predictor, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    each(many_images(1), tmp_path, lambda folder, odd: image_doors(folder, odd, predictor, capsys))


@pytest.mark.slow
def test_many_odd_texts(predictor: Predictor, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    each(MANY_TEXTS, tmp_path, lambda folder, odd: question_doors(folder, odd, predictor, capsys))
    each(MANY_TEXTS, tmp_path, lambda folder, odd: answer_doors(folder, odd, capsys))


def draw(mode: str, size: tuple[int, int], kind: str, **options: Any) -> Callable[[Path], None]:
    return lambda path: Image.new(mode, size).save(path, kind, **options)


LARGE: dict[str, Callable[[Path], None]] = {
    "clear.png": draw("RGBA", (10_000, 10_000), "PNG"),
    "deep.png": draw("I;16", (30_000, 300), "PNG"),
    "progressive.jpg": draw("CMYK", (9_100, 9_100), "JPEG", progressive=True, subsampling=0),
    "clear.webp": draw("RGBA", (7_000, 7_000), "WEBP", method=0),
}
"""The largest that are taken of the kinds that take the most, and one whose square would be 100 times its size."""


@pytest.mark.slow
def test_the_largest_images_take_less_than_a_gigabyte(tmp_path: Path) -> None:
    """Opened, padded to a square as in training, and asked about, one after the other."""
    look_at(make_bundle(tmp_path / "bundle"), tmp_path, LARGE)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava_next", "qwen2_vl"])
def test_the_largest_image_takes_less_than_a_gigabyte_as_tiles_and_as_patches(tmp_path: Path, family: str) -> None:
    look_at(make_published(tmp_path / "bundle", family), tmp_path, {"large.png": draw("RGB", (10_000, 10_000), "PNG")})


def look_at(bundle: Path, folder: Path, large: dict[str, Callable[[Path], None]]) -> None:
    """Each image is taken, and none takes a gigabyte."""
    paths = [folder / name for name in large]
    for path in paths:
        large[path.name](path)
    command = [sys.executable, "-m", "tests.support.peak_memory", str(bundle), *map(str, paths)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip().split("\n")
    found = dict(zip(large, (line.split("\t") for line in lines), strict=True))
    assert {name: verdict for name, (_, verdict) in found.items()} == dict.fromkeys(large, "taken")
    assert max(float(peak_mb) for peak_mb, _ in found.values()) < 1000, found
