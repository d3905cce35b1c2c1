"""A stage's adapters start from a directory that peft wrote: every tensor in its place, or no start at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.build import build_vlm, read_metadata
from models.common.errors import InputError
from models.common.sharded import TensorFiles
from models.config import SOURCES
from models.opening import open_model
from models.vlm import VLM
from tests.support.published import make_published
from trainer.config.tuning import Lora, TuningPlan
from trainer.engine.tuning import apply_plan

TARGETS = ("q_proj", "v_proj")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_published(tmp_path_factory.mktemp("adapters") / "llava")


def opened(folder: Path) -> VLM:
    source: Any = SOURCES.decode({"kind": "published", "path": str(folder)})
    return build_vlm(source, read_metadata(source, 128), frozen_dtype=torch.float32, seed=0).eval()


def write_adapter(published: Path, out: Path, *, dora: bool = False, where: str = "language_model") -> Any:
    """peft's own adapter over the stock class, with weights that are not 0; the adapted model."""
    from peft import LoraConfig, get_peft_model

    model = open_model(published, torch.device("cpu"))
    names = rf".*{where}.*\.({'|'.join(TARGETS)})"
    adapted = get_peft_model(model, LoraConfig(r=3, lora_alpha=6, use_dora=dora, target_modules=names))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in adapted.named_parameters():
        if ".lora_" in name:
            parameter.data += 0.2 * torch.rand(parameter.shape, generator=generator)
    adapted.save_pretrained(out)
    return adapted.eval()


def lora(adapter: Path, **more: Any) -> Lora:
    values = {"learning_rate": 1e-4, "rank": 3, "alpha": 6, "targets": TARGETS, **more}
    return Lora(adapter=str(adapter), **values)


@torch.no_grad()
def logits(vlm: VLM, ids_BL: Tensor) -> Tensor:
    return vlm.language(inputs_embeds=vlm.language.get_input_embeddings()(ids_BL)).logits


@pytest.mark.parametrize("dora", [False, True])
def test_the_start_is_what_peft_computes(published: Path, tmp_path: Path, dora: bool) -> None:
    adapted = write_adapter(published, tmp_path / "adapter", dora=dora)
    vlm, ids_BL = opened(published), torch.arange(10, 30)[None]
    before = logits(vlm, ids_BL)
    apply_plan(vlm, TuningPlan(language=lora(tmp_path / "adapter", dora=dora)), seed=0)
    found = logits(vlm, ids_BL)
    with torch.no_grad():
        expected = adapted(input_ids=ids_BL).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert not torch.allclose(found, before, atol=1e-2)


@pytest.mark.parametrize("beginning", ["base_model.model.language_model.model.", "base_model.model.model."])
def test_names_of_other_eras_and_of_a_language_model_alone(published: Path, tmp_path: Path, beginning: str) -> None:
    """Before 4.52 the whole model's names were others; the language model alone has no part before its names."""
    from safetensors.torch import save_file

    write_adapter(published, tmp_path / "adapter")
    vlm, ids_BL = opened(published), torch.arange(10, 30)[None]
    apply_plan(vlm, TuningPlan(language=lora(tmp_path / "adapter")), seed=0)
    expected, file = logits(vlm, ids_BL), tmp_path / "adapter" / "adapter_model.safetensors"
    files = TensorFiles.of_file(file)
    now = "base_model.model.model.language_model."
    save_file({name.replace(now, beginning): files.read(name) for name in files}, file)
    vlm = opened(published)
    apply_plan(vlm, TuningPlan(language=lora(tmp_path / "adapter")), seed=1)
    assert torch.equal(logits(vlm, ids_BL), expected)


def test_an_adapter_of_tower_and_language_model_starts_both(published: Path, tmp_path: Path) -> None:
    write_adapter(published, tmp_path / "adapter", where="")
    vlm, each = opened(published), lora(tmp_path / "adapter")
    apply_plan(vlm, TuningPlan(language=each, vision=each), seed=0)
    up = [value for name, value in vlm.vision.named_parameters() if ".lora_B." in name]
    assert len(up) == 2 * 3
    assert all(value.any() for value in up)
    with pytest.raises(InputError, match=r"it adapts vision too; set tune\.vision"):
        apply_plan(opened(published), TuningPlan(language=each), seed=0)


@pytest.mark.parametrize(
    ("plan", "config", "named"),
    [
        ({"rank": 4}, {}, r"tune\.language\.rank: 4, but the adapter in .* has 3"),
        ({"alpha": 7}, {}, r"tune\.language\.alpha: 7"),
        ({"dora": True}, {}, r"tune\.language\.dora: True"),
        ({"targets": ("q_proj",)}, {}, r"adapts other layers than tune\.language\.targets: the plan has none for"),
        ({"targets": (*TARGETS, "o_proj")}, {}, r"targets: it has none for .*o_proj.* \(4 lacking, 0 spare\)"),
        ({}, {"use_rslora": True}, "use_rslora is True, which is not applied here"),
        ({}, {"alpha_pattern": {"q_proj": 1}}, "alpha_pattern is"),
        ({}, {"modules_to_save": ["lm_head"]}, "modules_to_save is"),
        ({}, {"peft_type": "IA3"}, "a IA3 adapter"),
    ],
)
def test_an_adapter_that_is_another_is_refused(
    published: Path, tmp_path: Path, plan: dict[str, Any], config: dict[str, Any], named: str
) -> None:
    write_adapter(published, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    with pytest.raises(InputError, match=named):
        apply_plan(opened(published), TuningPlan(language=lora(tmp_path / "adapter", **plan)), seed=0)
