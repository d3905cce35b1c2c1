"""The models that other programs are asked to open: tiny ones of each family, in every format that has them.

Random weights answer nonsense, but each question its own nonsense, which is what a comparison needs. Tokens that are no
printable text are never answered: programs differ in how they write half a character.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from models.common.errors import run_cli
from tests.support.backbones import make_siglip
from tests.support.checkpoints import write_finished
from tests.support.foreign import with_dinov2
from tests.support.qformer import make_vit
from tests.support.towers import make_internvit
from tests.tools.conftest import merge, run_of
from tools.export.__main__ import main as export

WIDTH = 128
"""Of the language models: four heads of 32, the least that vLLM computes on a CPU."""
SIDE, NUM_IMAGES = 48, 24
QUESTIONS = (
    "What is in the picture?",
    "How many shapes are there?",
    "Which colour is the one on the left, and which the one on the right?",
)


def questions(folder: Path) -> list[dict[str, str]]:
    """72 questions about 24 drawn squares, which lie in `folder`; squares, since llama.cpp pads what is not."""
    folder.mkdir(parents=True, exist_ok=True)
    generator, rows = np.random.default_rng(0), []
    for number in range(NUM_IMAGES):
        image = Image.new("RGB", (SIDE, SIDE), tuple(int(level) for level in generator.integers(0, 256, 3)))
        draw = ImageDraw.Draw(image)
        for shape in (draw.ellipse, draw.rectangle, draw.ellipse):
            left, top, side = (int(each) for each in generator.integers(4, 36, 3))
            shape(
                (left, top, left + side, top + side), fill=tuple(int(level) for level in generator.integers(0, 256, 3))
            )
        image.save(folder / f"{number}.png")
        rows += [{"image": str(folder / f"{number}.png"), "question": each} for each in QUESTIONS]
    return rows


def only_printable(language: Path) -> None:
    """Take from the language model in `language` the rows of its head for tokens that are no printable text."""
    from safetensors.torch import load_file, save_file

    from models.languages.text import load_tokenizer

    file = language / "model.safetensors"
    weights, tokenizer = load_file(file), load_tokenizer(str(language))
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    for place in range(head.shape[0]):
        text = tokenizer.decode([place])
        is_printable = text.isascii() and text.isprintable() and text not in tokenizer.all_special_tokens
        if place != tokenizer.eos_token_id and not is_printable:
            head[place] = 0
    save_file(weights, file, metadata={"format": "pt"})


def clip(folder: Path) -> dict[str, Any]:
    """CLIP, mlp, Llama."""
    return run_of(folder, width=WIDTH)


def siglip(folder: Path) -> dict[str, Any]:
    """SigLIP, one linear layer, Qwen2 with tied embeddings."""
    recipe = run_of(folder, language="qwen2", tied=True, projector="linear", width=WIDTH)
    recipe["model"]["vision"] = {"kind": "siglip", "path": str(make_siglip(folder / "siglip")), "feature_layer": -2}
    return recipe


def dinov2(folder: Path) -> dict[str, Any]:
    """DINOv2, mlp, Qwen3."""
    return with_dinov2(run_of(folder, language="qwen3", width=WIDTH), folder)


def vit(folder: Path) -> dict[str, Any]:
    """ViT, mlp, Llama."""
    recipe = run_of(folder, width=WIDTH)
    recipe["model"]["vision"] = {"kind": "vit", "path": str(make_vit(folder / "vit"))}
    return recipe


def internvit(folder: Path) -> dict[str, Any]:
    """InternViT, mlp, Llama."""
    recipe = run_of(folder, width=WIDTH)
    recipe["model"]["vision"] = {"kind": "internvit", "path": str(make_internvit(folder / "internvit"))}
    return recipe


def anyres(folder: Path) -> dict[str, Any]:
    """CLIP, AnyRes, mlp, Llama: a LLaVA-NeXT."""
    recipe = run_of(folder, width=WIDTH)
    pinpoints = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
    recipe["model"]["image"] = {"kind": "anyres", "pinpoints": pinpoints}
    return recipe


FAMILIES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "clip": clip,
    "siglip": siglip,
    "dinov2": dinov2,
    "anyres": anyres,
    "vit": vit,
    "internvit": internvit,
}
FORMATS = ("stock", "w4a16", "w8a16", "gguf")


def make(folder: Path) -> dict[str, dict[str, Path | str]]:
    """Every family merged and exported below `folder`, unless it is there: family -> format -> directory, or why not.

    An adapter's directory is FOLDER/FAMILY/adapter, over FOLDER/FAMILY/base.
    """
    made: dict[str, dict[str, Path | str]] = {}
    for family, recipe_of in FAMILIES.items():
        where = folder / family
        if not (where / "made.json").is_file():
            shutil.rmtree(where, ignore_errors=True)
            _make_family(where, recipe_of)
        stored = json.loads((where / "made.json").read_text())
        made[family] = {name: said or where / name for name, said in stored.items()}
    return made


def _make_family(where: Path, recipe_of: Callable[[Path], dict[str, Any]]) -> None:
    where.mkdir(parents=True)
    recipe = recipe_of(where)
    only_printable(Path(recipe["model"]["language"]["path"]))
    write_finished(recipe, "lora")
    assert merge(recipe, where / "bundle", "--probes", "2") == 0
    said = {"bundle": ""}
    for name in FORMATS:
        words = [str(where / "bundle"), str(where / name), "--to", name]
        said[name] = _exported(words)
    words = [recipe["run"], str(where / "adapter"), "--to", "adapter", "--base", str(where / "base"), "--probes", "2"]
    said["adapter"] = _exported(words)
    (where / "made.json").write_text(json.dumps(said, indent=1))


def _exported(words: list[str]) -> str:
    """Run the command; returns what it said where it refused, else nothing."""
    import contextlib
    import io

    heard = io.StringIO()
    with contextlib.redirect_stderr(heard):
        code = run_cli(export, words)
    return "" if code == 0 else heard.getvalue().strip().splitlines()[-1]
