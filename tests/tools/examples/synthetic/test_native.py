"""The synthetic world's Qwen3-VL: as one from the hub, with images of both sizes as they are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models.common.errors import run_cli
from tools.examples.synthetic.__main__ import main
from tools.examples.synthetic.native import patches

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("native")
    for name, scale in (("world", "1"), ("world_2x", "2")):
        main(["world", str(folder / name), "--scenes", "320", "--held-out", "10", "--scale", scale])
    few = ["--steps", "4", "--batch-size", "8"]
    for kind in ("qwen3", "llama"):
        main(["language", str(folder / "world"), str(folder / kind), *few, "--kind", kind])
    worlds = ["--worlds", str(folder / "world"), str(folder / "world_2x")]
    assert run_cli(main, ["qwen3-vl", str(folder / "qwen3"), str(folder / "native"), *few, *worlds]) == 0
    return folder / "native"


def test_its_own_class_opens_it_and_its_processor_leaves_images_as_they_are(native: Path) -> None:
    from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from models.native.processors import Qwen3VLImagesProcessor

    model, found = Qwen3VLForConditionalGeneration.from_pretrained(native, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert json.loads((native / "video_preprocessor_config.json").read_text())["size"]["shortest_edge"] == 48 * 48
    tokenizer = AutoTokenizer.from_pretrained(native)
    processor = Qwen3VLImagesProcessor(
        image_processor=Qwen2VLImageProcessorPil.from_pretrained(native),
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
    )
    for folder, num_tokens in (("world", 4), ("world_2x", 16)):
        image = Image.open(next(iter((native.parent / folder / "held_out" / "images").iterdir()))).convert("RGB")
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is at the top left?"}]}]
        text = processor.apply_chat_template(chat, add_generation_prompt=True)
        inputs = processor(images=[image], text=[text], return_tensors="pt")
        assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == num_tokens
        mean, std = processor.image_processor.image_mean[0], processor.image_processor.image_std[0]
        bytes_CHW = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        expected = patches((bytes_CHW[None].float() / 255 - mean) / std, 12, 2)
        stored = inputs["pixel_values"].view(len(expected), 3, 2, 12, 12)
        torch.testing.assert_close(stored[:, :, 0], expected)
        assert model.generate(**inputs, max_new_tokens=2).shape[1] > inputs["input_ids"].shape[1]


def test_another_kind_of_language_model_is_refused(native: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["qwen3-vl", str(native.with_name("llama")), str(native.with_name("none")), "--steps", "1"]
    assert run_cli(main, [*words, "--worlds", str(native.with_name("world"))]) == 2
    assert "a llama; make one with --kind qwen3" in capsys.readouterr().err
    assert run_cli(main, ["qwen3-vl", str(native.with_name("gone")), *words[2:], "--worlds", str(native)]) == 2
    assert "gone: no such directory" in capsys.readouterr().err
    assert not native.with_name("none").exists()


def test_the_same_seed_gives_the_same_weights(native: Path, tmp_path: Path) -> None:
    worlds = ["--worlds", str(native.with_name("world")), str(native.with_name("world_2x"))]
    for seed in "01":
        words = ["qwen3-vl", str(native.with_name("qwen3")), str(tmp_path / seed), "--steps", "4", "--batch-size", "8"]
        main([*words, "--seed", seed, *worlds])
    weights = [(folder / "model.safetensors").read_bytes() for folder in (native, tmp_path / "0", tmp_path / "1")]
    assert weights[0] == weights[1] != weights[2]
