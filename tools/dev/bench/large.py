"""A 7B-shaped model merged and quantized to NF4 on a small machine: `python -m tools.bench.large`. Peak memory.

    drawn base (Vicuna-7B's shape, bf16, 13.5 GB) + drawn LoRA checkpoint of rank 16 --tools.merge--> bundle, 13.5 GB
                                                                                 --tools.quantize--> NF4 bundle, 4 GB

Weights are random, so answers are not checked; sizes, work and memory are those of a trained model. The
vision tower is CLIP's ViT-B/32. Needs 28 GB under `--folder` meanwhile; all of it is removed at the end.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.common.documents import parse
from models.common.errors import InputError, run_cli

if TYPE_CHECKING:
    import torch

    from trainer.checkpoint.format import Fragment

WIDTH, INNER, VOCABULARY, RANK, VISION_WIDTH = 4096, 11_008, 32_000, 16, 768
TEXTS = ["What is in the image? How many are there? Describe the image. What colour is it? Several colours."]


def main(argv: list[str]) -> int:
    """Make a random base and checkpoint, merge, quantize, and print each command's time and memory."""
    parser = argparse.ArgumentParser(prog="tools.bench.large", description="Merge and quantize a 7B-shaped model.")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench/large"), help="where the files lie meanwhile")
    parser.add_argument("--layers", type=int, default=32, help="of the language model; 32 make 13.5 GB")
    arguments = parser.parse_args(argv)
    if arguments.layers < 1:
        raise InputError("--layers: at least 1 is needed")
    from tools.dev.bench.measure import report, row
    from tools.dev.bench.merge import apart, run

    folder: Path = arguments.folder
    run_directory, merged, small = folder / "run", folder / "merged", folder / "nf4"
    measured = ["--probes", "1", "--memory-gb", "0"]  # opened whole, the model itself would be the memory's peak
    commands = {
        "merge": ["tools.merge", str(run_directory), str(merged), *measured],
        "quantize": ["tools.quantize", str(merged), str(small), "--to", "nf4", "--force", *measured],
    }
    rows = []
    try:
        apart(draw, folder, arguments.layers)
        for name, command in commands.items():
            spent = run([sys.executable, "-m", *command], Path(command[2]))
            shutil.rmtree(folder / "language", ignore_errors=True)  # the merged bundle does not need them
            size = sum(file.stat().st_size for file in Path(command[2]).iterdir())
            print(f"{name}: {spent}, {size / 1e9:.2f} GB written", flush=True)
            amounts = (("peak memory", "MB", spent.peak_bytes / 1e6), ("CPU seconds", "s", spent.cpu_seconds))
            for what, unit, amount in (*amounts, ("written", "MB", size / 1e6)):
                rows.append(row(f"{name}, {what}", unit, amount, amount, ["torch", "bitsandbytes"]))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    report("large", rows)
    return 0


def draw(folder: Path, num_layers: int) -> None:
    """Write the vision tower, the base and a run whose LoRA stage is finished."""
    import torch

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    _draw_vision(folder / "vision")
    _draw_language(folder / "language", num_layers)
    _draw_run(folder, num_layers)


def _draw_vision(folder: Path) -> None:
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    CLIPVisionModel(CLIPVisionConfig()).to(torch.bfloat16).save_pretrained(folder)  # the defaults are ViT-B/32's
    CLIPImageProcessorPil().save_pretrained(folder)


def _draw_language(folder: Path, num_layers: int) -> None:
    from transformers import LlamaConfig

    from models.common.sharded import ShardedWriter
    from tools.examples.synthetic.language import train_tokenizer

    tokenizer = train_tokenizer(TEXTS)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=num_layers,
        num_attention_heads=32,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    writer = ShardedWriter(folder)
    for name, value in _language(num_layers):
        writer.add(name, value)
    writer.close()


def _language(num_layers: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight of the base in bf16: slices of one drawn pool, since drawing 7 billion takes longer than merging."""
    import math

    import torch

    pool = torch.randn(1 << 26).mul_(0.02).to(torch.bfloat16)
    start = 0
    for name, shape in shapes_of(num_layers).items():
        numel = math.prod(shape)
        start = (start + 1_000_003) % (len(pool) // 2)
        flat = pool[start:] if numel > len(pool) - start else pool[start : start + numel]
        flat = flat.repeat(math.ceil(numel / len(flat)))[:numel]
        yield name, torch.ones(shape, dtype=torch.bfloat16) if len(shape) == 1 else flat.view(shape)


def shapes_of(num_layers: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of Vicuna-7B's weights."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, WIDTH)}
    for number in range(num_layers):
        layer = f"model.layers.{number}"
        shapes |= {f"{layer}.{name}.weight": shape for name, shape in LINEAR.items()}
        shapes |= {f"{layer}.{side}_layernorm.weight": (WIDTH,) for side in ("input", "post_attention")}
    return shapes | {"model.norm.weight": (WIDTH,), "lm_head.weight": (VOCABULARY, WIDTH)}


LINEAR = {
    **{f"self_attn.{side}_proj": (WIDTH, WIDTH) for side in "qkvo"},
    **{f"mlp.{side}_proj": (INNER, WIDTH) for side in ("gate", "up")},
    "mlp.down_proj": (WIDTH, INNER),
}


def _draw_run(folder: Path, num_layers: int) -> None:
    """The LoRA stage of a recipe, finished after one step, as the trainer leaves it."""
    from models.common.files import write_json
    from trainer.checkpoint.initial_weights import base_digests
    from trainer.checkpoint.manager import CheckpointManager
    from trainer.config.recipe import Recipe
    from trainer.distributed.context import DistributedContext

    recipe = Recipe.model_validate_json(json.dumps(_recipe(folder)))
    stage = Path(recipe.run) / "lora"
    state = {
        "base": base_digests(recipe),
        "config": parse(recipe.stage("lora").model_dump_json(), "the stage"),
        "consumed": {"steps": 1, "samples": 1, "tokens": 1, "draws": 1, "batches": 1},
    }
    saver = CheckpointManager(stage / "checkpoints", DistributedContext(), keep=1, token="bench")
    saver.begin(1, fragments=list(_fragments(num_layers)), inherited=[], state=state)
    fault = saver.finish()
    if fault:
        raise InputError(f"{stage}: {fault}")
    write_json(stage / "finished.json", {"checkpoint": "step_000001", "samples": 1})
    write_json(Path(recipe.run) / "recipe.json", parse(recipe.model_dump_json(), "the recipe"))


def _recipe(folder: Path) -> dict[str, Any]:
    stage = {
        "tune": {
            "projector": {"kind": "full", "learning_rate": 1e-5},
            "language": {"kind": "lora", "learning_rate": 1e-4, "rank": RANK, "alpha": 2 * RANK},
        },
        "data": {"sources": [{"path": str(folder)}], "template": {"kind": "tokenizer"}, "max_length": 256},
        "duration": {"unit": "steps", "count": 1},
        "batch": {"global_rows": 1, "micro_rows": 1},
        "engine": {"zero": "zero2", "precision": "bf16"},
    }
    model = {
        "vision": {"kind": "clip", "path": str(folder / "vision"), "feature_layer": -2},
        "projector": {"kind": "mlp"},
        "language": {"kind": "pretrained", "path": str(folder / "language")},
    }
    return {"name": "large", "run": str(folder / "run"), "model": model, "stages": {"lora": stage}}


def _fragments(num_layers: int) -> Iterator[Fragment]:
    """Drawn weights of the projector and of the adapters on every linear layer."""
    import torch

    from trainer.checkpoint.format import Fragment

    shapes: dict[str, tuple[int, ...]] = {
        "projector.linear_1.weight": (WIDTH, VISION_WIDTH),
        "projector.linear_1.bias": (WIDTH,),
        "projector.linear_2.weight": (WIDTH, WIDTH),
        "projector.linear_2.bias": (WIDTH,),
    }
    for number in range(num_layers):
        for name, (rows, columns) in LINEAR.items():
            stem = f"language.model.layers.{number}.{name}"
            shapes[f"{stem}.lora_A.default.weight"] = (RANK, columns)
            shapes[f"{stem}.lora_B.default.weight"] = (rows, RANK)
    for name, shape in shapes.items():
        yield Fragment(name, shape, 0, torch.randn(shape).mul_(0.02).view(-1), {})


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
