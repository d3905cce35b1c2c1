"""Bundles of every precision, whole and quantized, answer where a user opens them: here, and in stock transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from models.bundle import read_manifest, verify
from models.common.errors import run_cli
from models.common.sharded import TensorFiles
from tests.support import warm
from tests.support.backbones import hold_in_bf16
from tests.support.bundles import image
from tests.support.checkpoints import write_finished
from tests.support.paths import REPOSITORY
from tests.tools.conftest import beside, merge, run_of
from tools.export.answering import answer_checks
from tools.export.golden import drawn
from tools.export.quantize import main as quantize_main

OURS, STOCK = "a whole answer is written", "a whole answer is written by stock transformers"
KINDS, FORMATS = ("clip", "dinov2", "mixed", "anyres", "fp16", "fp32"), ("merged", "nf4", "int8")
DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
QUESTION, NUM_TOKENS = "What is in the image?", 8

WITH_US = f"""
import json, sys
import sightline
models = {{path: sightline.load(path, device="cpu") for path in sys.argv[2:]}}
chat = lambda model: model.chat(sys.argv[1], {QUESTION!r}, max_new_tokens={NUM_TOKENS})
print(json.dumps({{path: chat(model) for path, model in models.items()}}))
"""
WITHOUT_US = f"""
import json, sys
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
answers = {{}}
for bundle in sys.argv[2:]:
    processor = AutoProcessor.from_pretrained(bundle, backend="pil")
    model = AutoModelForImageTextToText.from_pretrained(bundle, dtype="auto")
    content = [{{"type": "image", "image": Image.open(sys.argv[1])}}, {{"type": "text", "text": {QUESTION!r}}}]
    inputs = processor.apply_chat_template(
        [{{"role": "user", "content": content}}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )
    ids = model.generate(**inputs.to(model.device), max_new_tokens={NUM_TOKENS})
    text = processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
    answers[bundle] = text.strip()
assert not [name for name in sys.modules if name.partition(".")[0] in ("models", "sightline", "eval")]
print(json.dumps(answers))
"""


def make_dinov2(folder: Path) -> None:
    from transformers import Dinov2Config, Dinov2Model
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(**shape, image_size=48, patch_size=12)).save_pretrained(folder)
    size = {"height": 48, "width": 48}
    CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size=size).save_pretrained(folder)


def make_bundles(folder: Path, kind: str) -> None:
    """merged, nf4 and int8 in `folder`, of bases in fp32; `mixed` has a language model in bf16 beside its tower."""
    recipe = run_of(folder)
    if kind == "anyres":
        recipe["model"]["image"] = {"kind": "anyres", "pinpoints": [[48, 96], [96, 48]]}
    if kind == "dinov2":
        make_dinov2(folder / "dinov2")
        recipe["model"]["vision"] = {"kind": "dinov2", "path": str(folder / "dinov2"), "feature_layer": -1}
    if kind == "mixed":
        hold_in_bf16(folder / "language")
    recipe["stages"]["lora"]["engine"]["precision"] = kind if kind in DTYPES else "bf16"
    write_finished(recipe, "lora")
    assert merge(recipe, folder / "merged", "--probes", "2") == 0
    for target in ("nf4", "int8"):
        words = [str(folder / "merged"), str(folder / target), "--to", target, "--probes", "2", "--force"]
        assert run_cli(quantize_main, words) == 0


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Every kind's bundle in every format; what is no dtype is in bf16."""
    folder = tmp_path_factory.mktemp("half")
    for kind in KINDS:
        make_bundles(folder / kind, kind)
    return {(kind, each): folder / kind / each for kind in KINDS for each in FORMATS}


def dtypes_said(config: Any) -> set[str]:
    """Every `dtype` of a config.json, at any depth."""
    inner = [value for value in config.values() if isinstance(value, dict)]
    said = {config[key] for key in ("dtype", "torch_dtype") if config.get(key) is not None}
    return said.union(*(dtypes_said(value) for value in inner))


@pytest.mark.slow
def test_the_config_says_what_the_tensors_are(bundles: dict[tuple[str, str], Path]) -> None:
    """What quantization adds beside the weights is its own affair."""
    for (kind, each), bundle in bundles.items():
        dtype = DTYPES.get(kind, torch.bfloat16)
        files = TensorFiles.open(bundle)
        extras = (".SCB", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
        found = {files.stored(name).dtype for name in files if not name.endswith(extras)}
        assert {one for one in found if one.is_floating_point} == {dtype}, bundle
        config = json.loads((bundle / "config.json").read_text())
        assert dtypes_said(config) == {str(dtype).removeprefix("torch.")}, (kind, each)


@pytest.mark.slow
def test_both_loaders_write_the_same_answer(bundles: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    """Each in a process of its own; stock transformers in one that has never heard of this project."""
    image().save(tmp_path / "photo.png")
    words = [str(tmp_path / "photo.png"), *map(str, bundles.values())]
    said = []
    for python, options, code, where in (
        (warm.python(), ["-c"], WITH_US, REPOSITORY),
        (sys.executable, ["-I", "-c"], WITHOUT_US, tmp_path),
    ):
        command = [python, *options, code, *words]
        done = subprocess.run(command, cwd=where, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        said.append(json.loads(done.stdout.splitlines()[-1]))
    assert said[0] == said[1]
    assert len(said[0]) == len(bundles)


@pytest.mark.slow
def test_the_report_says_that_both_answered(bundles: dict[tuple[str, str], Path]) -> None:
    for bundle in bundles.values():
        checks = {check.name: check for check in verify(bundle).parity.checks}
        for name in (OURS, STOCK):
            assert (checks[name].passed, checks[name].value, checks[name].bound, checks[name].note) == (True, 1, 1, "")


@pytest.mark.slow
def test_a_wrong_dtype_fails_and_says_what_was_raised(
    bundles: dict[tuple[str, str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The fault that this report once passed over: a config that says float32 over tensors in bf16."""
    import models.opening
    import tools.export.parity as parity

    def misread(directory: Path) -> Any:
        config = real(directory)
        config.dtype = torch.float32
        return config

    real, words = models.opening.open_config, [str(bundles["clip", "merged"]), str(tmp_path / "out")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models.opening, "open_config", misread)
        for bounds, loose in ((parity.LOGIT_BOUNDS, 9.0), (parity.GREEDY_BOUNDS, 0.0), (parity.SCORE_BOUNDS, 9.0)):
            patch.setitem(bounds, "nf4", loose)  # random weights hardly survive 4 bits
        assert run_cli(quantize_main, words) == 2
        message = capsys.readouterr().err
        assert f"{OURS}: no, RuntimeError: mixed dtype" in message
        assert f"{STOCK}: no, RuntimeError: mixed dtype" in message
        assert not (tmp_path / "out").exists()
        assert run_cli(quantize_main, [*words, "--force"]) == 0
    assert read_manifest(tmp_path / "out").forced


def test_what_does_not_fit_is_not_tried_and_says_so(
    trained: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert merge(trained, tmp_path / "out", "--probes", "1", "--memory-gb", "0.1") == 0
    assert f"{OURS}: not tried, opening takes 0.5 GB and --memory-gb allows 0.1" in capsys.readouterr().out
    check = next(check for check in verify(tmp_path / "out").parity.checks if check.name == OURS)
    assert (check.value, check.bound) == (0.0, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tools.export.answering.free_bytes", lambda _: 300_000_000)
        (first, _) = answer_checks(beside(trained, "bundle"), drawn(1)[0])
    assert first.note == "not tried, opening takes 0.5 GB and 0.3 are free"
