"""Tiny random pretrained parts in Hugging Face format: what `model.vision.path` and `model.language.path` point at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

SENTENCES = (
    "What is in the picture? How many shapes are there? Which colour is the one on the left?",
    "A red circle, a large blue square and two small green triangles above the yellow star.",
    "user assistant system picture question answer yes no one two three four",
)
IMAGE_SIZE, PATCH_SIZE = 48, 12
NUM_IMAGE_TOKENS = 16


def make_clip(folder: Path, *, seed: int = 0) -> Path:
    """A whole random CLIP (both towers), as it lies on the hub, with its preprocessor configuration."""
    from transformers import CLIPConfig, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**vision, "vocab_size": 64, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 1}
    torch.manual_seed(seed)
    config = CLIPConfig(
        vision_config={**vision, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE},
        text_config={**text, "pad_token_id": 1},
        projection_dim=16,
    )
    CLIPModel(config).save_pretrained(folder)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=size).save_pretrained(folder)
    return folder


def make_siglip(folder: Path, *, seed: int = 0) -> Path:
    """A random SigLIP tower, with its preprocessor configuration."""
    from transformers import SiglipVisionConfig, SiglipVisionModel
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    torch.manual_seed(seed)
    config = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
    )
    model = SiglipVisionModel(config)
    with torch.no_grad():
        for parameter in model.parameters():  # far from its start, where all pictures look alike
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}).save_pretrained(folder)
    return folder


def make_language(
    folder: Path,
    kind: str = "llama",
    *,
    tied: bool = False,
    seed: int = 0,
    width: int = 32,
    num_layers: int = 2,
    tokenizer: Any = None,
) -> Path:
    """A random causal language model, of two layers by default, with a byte-level tokenizer that has ChatML's tokens.

    All of its linear layers fit into NF4 at a `width` of 64, only the last of each layer at 32. A `tokenizer` that is
    given is not written.
    """
    import transformers

    is_given, tokenizer = tokenizer is not None, tokenizer or make_tokenizer()
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": 0.2,  # large enough that greedy answers differ from prompt to prompt
    }
    names = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    if kind == "qwen3":
        shape["head_dim"] = width // 4
    torch.manual_seed(seed)
    config = getattr(transformers, f"{names[kind]}Config")(**shape)
    getattr(transformers, f"{names[kind]}ForCausalLM")(config).save_pretrained(folder)
    if not is_given:
        tokenizer.save_pretrained(folder)
    return folder


def make_sentencepiece(folder: Path, *, legacy: bool) -> Any:
    """SentencePiece's BPE with bytes, like Llama's, as tokenizer.model alone; returns transformers' tokenizer of it."""
    from sentencepiece import SentencePieceTrainer
    from transformers import AutoTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_prefix=str(folder / "tokenizer"), model_type="bpe", vocab_size=384,
        byte_fallback=True, character_coverage=1.0, normalization_rule_name="identity", minloglevel=2,
        remove_extra_whitespaces=False, hard_vocab_limit=False,
    )  # fmt: skip
    (folder / "tokenizer.vocab").unlink()
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "legacy": legacy, **names})
    )
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return AutoTokenizer.from_pretrained(folder)


def hold_in_bf16(folder: Path) -> None:
    """Write the language model in `folder` again, in bf16: a base of another dtype than its tower."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)


def make_tokenizer() -> Any:
    """Byte-level BPE with the tokens of ChatML; no image token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
    )


def tiny_recipe(folder: Path, shards: Path, **stages: dict[str, Any]) -> dict[str, Any]:
    """A recipe (as a dict) over tiny parts in `folder` and the shard set `shards`: align, then LoRA from it."""
    if not (folder / "vision").is_dir():
        make_clip(folder / "vision")
        make_language(folder / "language")
    data = {
        "sources": [{"path": str(shards)}],
        "template": {"kind": "chatml"},
        "max_length": 256,
        "num_workers": 0,
    }
    common = {
        "data": data,
        "duration": {"unit": "steps", "count": 6},
        "batch": {"global_rows": 4, "micro_rows": 2},
        "engine": {"zero": "zero2", "precision": "fp32"},
        "checkpoint": {"every_steps": 2, "keep": 10},
    }
    align = {**common, "tune": {"projector": {"kind": "full", "learning_rate": 1e-2}}}
    lora = {
        **common,
        "init": "align",
        "tune": {
            "projector": {"kind": "full", "learning_rate": 1e-3},
            "language": {"kind": "lora", "learning_rate": 1e-2, "rank": 4, "alpha": 8},
        },
    }
    return {
        "name": "tiny",
        "run": str(folder / "run"),
        "model": {
            "vision": {"kind": "clip", "path": str(folder / "vision"), "feature_layer": -2},
            "projector": {"kind": "mlp"},
            "language": {"kind": "pretrained", "path": str(folder / "language")},
        },
        "stages": {"align": {**align, **stages.get("align", {})}, "lora": {**lora, **stages.get("lora", {})}},
        "tracking": {"log_every_steps": 1},
    }


def write_recipe(file: Path, recipe: dict[str, Any]) -> Path:
    """The recipe as a YAML file (JSON is YAML)."""
    file.write_text(json.dumps(recipe, indent=1), encoding="utf-8")
    return file
