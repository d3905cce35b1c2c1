"""A bundle opens where this project is not: in a fresh environment, and under the names that vLLM loads."""

from __future__ import annotations

import ast
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

import sightline
from data_pipeline.images import open_image
from models.common.sharded import TensorFiles
from models.opening import open_processor
from tests.support.documents import opening_lines
from tests.support.installed import environment_of
from tests.tools.conftest import beside

WITHOUT_US = opening_lines()


def test_the_documented_lines_open_an_image_as_training_does(tmp_path: Path) -> None:
    names: dict[str, Any] = {}
    function = next(node for node in ast.parse(WITHOUT_US).body if isinstance(node, ast.FunctionDef))
    exec("import numpy as np\nfrom PIL import Image, ImageOps\n" + ast.unparse(function), names)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    rows = np.random.default_rng(0).integers(0, 256, (8, 5, 4), dtype=np.uint8)
    Image.fromarray(rows[..., :3]).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(rows).save(tmp_path / "transparent.png")
    Image.fromarray(rows[..., 0].astype(np.uint16) * 257).save(tmp_path / "deep.png")
    Image.fromarray(rows[..., 0]).save(tmp_path / "grey.png")
    for file in tmp_path.glob("*.png"):
        found = names["opened"](str(file))
        assert (found.size, found.tobytes()) == (open_image(file).size, open_image(file).tobytes()), file.name


@pytest.mark.slow
def test_a_bundle_opens_with_the_backend_of_training(trained: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Torchvision, which transformers takes by itself where it is installed, makes other pixels."""
    from transformers import AutoProcessor

    asked: list[Any] = []
    original = AutoProcessor.from_pretrained
    monkeypatch.setattr(
        AutoProcessor,
        "from_pretrained",
        lambda *words, **options: asked.append(options["backend"]) or original(*words, **options),
    )
    processor = open_processor(beside(trained, "bundle"))
    assert asked == ["pil"]
    assert type(processor.image_processor).__name__.endswith("Pil")


@pytest.mark.slow
def test_a_fresh_environment_gives_the_same_answer(quickstart_run: Path, tmp_path: Path) -> None:
    """torch, transformers, pillow; for NF4 bitsandbytes and what transformers wants with it; and what these require."""
    python = environment_of(tmp_path / "fresh", "torch", "transformers", "pillow", "bitsandbytes", "accelerate")
    (tmp_path / "open.py").write_text(WITHOUT_US)
    world, bundle = quickstart_run / "world" / "held_out", quickstart_run / "bundle"
    question = json.loads((world / "questions.json").read_text())["questions"][0]["question"]
    photo = min((world / "images").iterdir())
    command = [str(python), "-I", str(tmp_path / "open.py"), str(bundle), str(photo), question]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == sightline.load(bundle, device="cpu").chat(photo, question, max_new_tokens=64)


RENAMED_BY_VLLM = {  # LlavaForConditionalGeneration.hf_to_vllm_mapper of vllm/model_executor/models/llava.py
    "model.language_model.": "language_model.model.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "lm_head.": "language_model.lm_head.",
}
KNOWN_TO_VLLM = (  # its modules after renaming; q, k, v and gate, up are stacked by their own names in Llama and Qwen2
    r"language_model\.model\.(embed_tokens|norm)\.weight",
    r"language_model\.model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\.(weight|bias)",
    r"language_model\.model\.layers\.\d+\.(input|post_attention)_layernorm\.weight",
    r"language_model\.lm_head\.weight",
    r"vision_tower\.vision_model\.embeddings\.(class_embedding|patch_embedding\.weight|position_embedding\.weight)",
    r"vision_tower\.vision_model\.(pre_layrnorm|post_layernorm)\.(weight|bias)",
    r"vision_tower\.vision_model\.encoder\.layers\.\d+\.(layer_norm[12]|self_attn\.(q_proj|k_proj|v_proj|out_proj)"
    r"|mlp\.fc[12])\.(weight|bias)",
    r"multi_modal_projector\.linear_[12]\.(weight|bias)",
)


def test_names_are_those_that_vllm_loads(trained: dict[str, Any]) -> None:
    names = set(TensorFiles.open(beside(trained, "bundle")))
    for name in names:
        old = next((prefix for prefix in RENAMED_BY_VLLM if name.startswith(prefix)), "")
        renamed = RENAMED_BY_VLLM[old] + name.removeprefix(old) if old else name
        assert renamed == name, "the classic layout is what its modules are called"
        assert any(re.fullmatch(pattern, renamed) for pattern in KNOWN_TO_VLLM), name
    config = json.loads((beside(trained, "bundle") / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert {"language_model.model.embed_tokens.weight", "language_model.lm_head.weight"} <= names


def test_nothing_in_a_bundle_can_be_unpickled(trained: dict[str, Any]) -> None:
    found = {path.suffix for path in beside(trained, "bundle").iterdir()}
    assert found == {".safetensors", ".json", ".jinja"}
