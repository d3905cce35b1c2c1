"""An adapter over a published model: over that very model, peft gives the merged one's answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from models.common.errors import run_cli
from tests.support.bundles import image
from tests.support.checkpoints import write_finished
from tests.support.published import make_published
from tools.export.__main__ import main as export
from tools.export.merge import main as merge

LORA = {"kind": "lora", "learning_rate": 1e-2, "rank": 4, "alpha": 8}
FULL = {"kind": "full", "learning_rate": 1e-3}
VISION = {**LORA, "rank": 2, "alpha": 6, "targets": ["q_proj", "fc1"]}
TUNED: dict[str, tuple[str, dict[str, Any]]] = {
    "the language model": ("llava_next", {"language": LORA}),
    "the projector in full": ("llava", {"language": LORA, "projector": FULL}),
    "every part by DoRA": (
        "llava_onevision",
        {part: {**each, "dora": True} for part, each in (("language", LORA), ("projector", LORA), ("vision", VISION))},
    ),
    "tower and merger of native resolution": (
        "qwen2_5_vl",
        {"language": LORA, "projector": {**LORA, "rank": 3}, "vision": {**LORA, "rank": 2, "alpha": 6}},
    ),
    "its mergers in full": ("qwen3_vl", {"language": LORA, "projector": FULL, "vision": {**LORA, "rank": 2}}),
}


def finished(folder: Path, family: str, tune: dict[str, Any]) -> dict[str, Any]:
    data = {"sources": [{"path": str(folder / "shards")}], "template": {"kind": "model"}, "max_length": 256}
    stage = {"tune": tune, "data": data, "duration": {"unit": "steps", "count": 6}}
    stage |= {"batch": {"global_rows": 2, "micro_rows": 1}, "engine": {"zero": "zero2", "precision": "fp32"}}
    model = {"kind": "published", "path": str(make_published(folder / "published", family))}
    recipe = {"name": "tiny", "run": str(folder / "run"), "model": model, "stages": {"sft": stage}}
    write_finished(recipe, "sft")
    return recipe


@pytest.mark.slow
@pytest.mark.parametrize("tuned", TUNED)
def test_peft_over_the_published_model_gives_the_merged_models_answers(tmp_path: Path, tuned: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    from models.opening import open_processor
    from tools.export.golden import Probe
    from tools.export.parity import stock_inputs, token_types

    recipe = finished(tmp_path, *TUNED[tuned])
    assert run_cli(merge, [recipe["run"], str(tmp_path / "merged"), "--probes", "1"]) == 0
    assert run_cli(export, [recipe["run"], str(tmp_path / "adapter"), "--to", "adapter", "--probes", "2"]) == 0
    assert not (tmp_path / "adapter" / "projector.safetensors").exists()
    base = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == "published"
    merged, plain, other = (
        AutoModelForImageTextToText.from_pretrained(tmp_path / name, dtype=torch.float32).eval()
        for name in ("merged", "published", "published")
    )
    adapted = PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).eval()
    inputs = stock_inputs(open_processor(tmp_path / "published"), Probe(image(), "What is it?", "It."))
    inputs |= token_types(merged, inputs["input_ids"])
    with torch.no_grad():
        expected, found, before = (model(**inputs).logits for model in (merged, adapted, other))
    assert (before - expected).abs().max() > 0.1, "something was learnt"
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    answers = [model.generate(**inputs, max_new_tokens=8).tolist() for model in (merged, adapted)]
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("family", "tune", "said"),
    [
        ("llava_next", {"language": LORA, "projector": FULL}, "projector.newline.weight was trained in full as well"),
        ("llava", {"language": LORA, "vision": FULL}, "vision.* was trained in full as well"),
        ("llava", {"language": LORA, "projector": {**LORA, "dora": True}}, "DoRA in one part and LoRA in another"),
    ],
)
def test_what_no_adapter_can_say_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str, tune: dict[str, Any], said: str
) -> None:
    import re

    recipe = finished(tmp_path, family, tune)
    assert run_cli(export, [recipe["run"], str(tmp_path / "out"), "--to", "adapter", "--probes", "1"]) == 2
    assert re.search(said, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()
