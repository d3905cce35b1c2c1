"""Each command that opens a bundle, as a process of its own: on bundles that stock transformers does not know, and on
quantized ones of a stage in bf16."""

from __future__ import annotations

import subprocess
from inspect import cleandoc
from pathlib import Path
from typing import Any

import pytest

import sightline
from models.bundle import verify
from models.common.errors import run_cli
from tests.support import warm
from tests.support.backbones import hold_in_bf16
from tests.support.benchmarks import make_benchmark
from tests.support.bundles import image
from tests.support.checkpoints import write_finished
from tests.support.pages import PAGE_TOKENS, answer_of_page
from tests.support.paths import REPOSITORY
from tests.support.qformer import qformer_recipe
from tests.tools.conftest import merge, run_of
from tools.export.quantize import main as quantize_main

MODULE, VERB = ["-m", "tools.quantize"], ["-c", "from tools.cli import main; raise SystemExit(main())", "quantize"]
PARTS: dict[str, dict[str, Any]] = {
    "pixel_shuffle": {"projector": {"kind": "pixel_shuffle", "factor": 2}},
    "perceiver": {"projector": {"kind": "perceiver", "num_queries": 5, "num_layers": 2, "num_heads": 4}},
    "future": {"future": {"kind": "sequential"}},
    "decoder": {"future": {"kind": "parallel", "num_tokens": 4}},
}


def own_bundle(folder: Path, kind: str, precision: str = "fp32") -> Path:
    """A bundle of our own class: of one of our projectors, of heads for further tokens, or of our own decoder."""
    recipe = qformer_recipe(folder, folder / "shards") if kind == "qformer" else run_of(folder)
    recipe["model"] |= PARTS.get(kind, {})
    stage = recipe["stages"]["lora"]
    stage["init"], stage["engine"]["precision"] = None, precision
    if kind in ("future", "decoder"):
        stage["tune"]["future"] = {"kind": "full", "learning_rate": 1e-3}
    if kind == "decoder":
        shape = {"num_layers": 2, "num_heads": 4, "width": 32, "max_positions": 512}
        recipe["model"]["language"] = {"kind": "decoder", "tokenizer": str(folder / "language"), **shape}
        stage["tune"]["language"] = {"kind": "full", "learning_rate": 1e-3}
    write_finished(recipe, "lora")
    assert merge(recipe, folder / "bundle", "--probes", "2", "--force") == 0
    return folder / "bundle"


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([warm.python(), *words], cwd=REPOSITORY, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "precision", "words"),
    [
        ("pixel_shuffle", "fp32", MODULE),
        ("perceiver", "bf16", MODULE),
        ("qformer", "bf16", VERB),
        ("future", "bf16", VERB),
        ("decoder", "bf16", MODULE),
    ],
)
def test_quantize_opens_our_class(tmp_path: Path, kind: str, precision: str, words: list[str]) -> None:
    bundle, small = own_bundle(tmp_path, kind, precision), tmp_path / "small"
    done = command(*words, str(bundle), str(small), "--to", "nf4", "--probes", "2", "--force")
    assert done.returncode == 0, done.stderr[-3000:]
    checks = {check.name: check for check in verify(small).parity.checks}
    assert checks["a whole answer is written"].passed, checks["a whole answer is written"].note
    assert "a whole answer is written by stock transformers" not in checks


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Bundles in bf16: of our own class, of LLaVA's with a language model whose base is in bf16, and quantized."""
    own = own_bundle(tmp_path_factory.mktemp("own"), "pixel_shuffle", "bf16")
    folder = tmp_path_factory.mktemp("stock")
    recipe = run_of(folder)
    hold_in_bf16(folder / "language")
    recipe["stages"]["lora"]["engine"]["precision"] = "bf16"
    write_finished(recipe, "lora")
    assert merge(recipe, folder / "merged", "--probes", "2") == 0
    for target in ("nf4", "int8"):
        words = [str(folder / "merged"), str(folder / target), "--to", target, "--probes", "2", "--force"]
        assert run_cli(quantize_main, words) == 0
    return {"own": own, **{name: folder / name for name in ("merged", "nf4", "int8")}}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["own", "nf4", "int8"])
def test_eval_opens_it(made: dict[str, Path], name: str, tmp_path: Path) -> None:
    tiny, out = make_benchmark(tmp_path), tmp_path / "scores.json"
    words = ["--questions", tiny.questions, "--annotations", tiny.annotations, "--images", tiny.images, "--out", out]
    done = command("-m", "eval.run", str(made[name]), "--task", "vqa", *map(str, words))
    assert done.returncode == 0, done.stderr[-3000:]
    assert out.is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["own", "merged", "nf4", "int8"])
def test_the_demo_answers_as_the_library_does(made: dict[str, Path], name: str, tmp_path: Path) -> None:
    photo, question = tmp_path / "photo.png", "What is in the image?"
    image().save(photo)
    words = [warm.python(), "-m", "tools.demo", str(made[name]), "--device", "cpu"]
    answer = answer_of_page(words, photo, question, where=REPOSITORY)
    expected = sightline.load(made[name], device="cpu").chat(photo, question, max_new_tokens=PAGE_TOKENS)
    assert answer == cleandoc(expected)
    assert answer
