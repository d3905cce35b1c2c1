"""What a recipe's pretrained parts look like, where their weights may not lie on this machine.

Owns finding each part's config.json (its directory, the hub's cache, the facts of well-known models below) and counting
parameters exactly: the parts are built on PyTorch's meta device, which has shapes and no memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.errors import InputError
from models.source import read_json
from trainer.config import Frozen, Full, Lora, TuningPlan

if TYPE_CHECKING:
    from torch import nn

    from models.config import LanguageConfig, ModelConfig, VisionConfig

_CLIP_L: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
}
_BASE: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
_QWEN: dict[str, Any] = {"model_type": "qwen2", "vocab_size": 151936, "tie_word_embeddings": True}

KNOWN: dict[str, dict[str, Any]] = {
    "openai/clip-vit-large-patch14": _CLIP_L,
    "openai/clip-vit-large-patch14-336": {**_CLIP_L, "image_size": 336},
    "openai/clip-vit-base-patch32": {**_BASE, "model_type": "clip_vision_model", "image_size": 224, "patch_size": 32},
    "google/vit-base-patch16-224": {**_BASE, "model_type": "vit", "image_size": 224, "patch_size": 16},
    "google/vit-base-patch32-384": {**_BASE, "model_type": "vit", "image_size": 384, "patch_size": 32},
    "distilbert/distilbert-base-uncased": {
        "model_type": "distilbert",
        "dim": 768,
        "hidden_dim": 3072,
        "n_layers": 6,
        "n_heads": 12,
        "vocab_size": 30522,
        "max_position_embeddings": 512,
    },
    "lmsys/vicuna-7b-v1.5": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    },
    "Qwen/Qwen2.5-0.5B": {
        **_QWEN,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
    },
    "Qwen/Qwen2.5-3B-Instruct": {
        **_QWEN,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
    },
    "openai-community/gpt2": {"model_type": "gpt2", "vocab_size": 50257},
    "HuggingFaceTB/SmolLM-135M-Instruct": {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    },
}
"""config.json of the models that the shipped recipes name, as far as shapes go; from their pages on the hub."""


@dataclass(frozen=True)
class PartFacts:
    """A part's config.json and where it was found."""

    config: dict[str, Any]
    source: str
    directory: Path | None
    """Where its weights and files lie; None: not on this machine."""


def find_part(path: str) -> PartFacts:
    """The configuration of the part at `path`, a directory or a hub name; nothing is downloaded.

    Raises InputError where neither the machine nor the table of well-known models has it.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        return PartFacts(read_json(local, "config.json"), str(local / "config.json"), local)
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(path, "config.json") if path.count("/") == 1 else None
    if isinstance(cached, str):
        folder = Path(cached).parent
        complete = any(folder.glob("*.safetensors"))
        return PartFacts(json.loads(Path(cached).read_text(encoding="utf-8")), cached, folder if complete else None)
    if path in KNOWN:
        return PartFacts(KNOWN[path], f"{path}: not on this machine; its published shapes", None)
    raise InputError(f"{path}: no such directory, not in the hub's cache, and its shapes are not known here")


def text_facts(model: ModelConfig) -> dict[str, Any] | None:
    """The config.json of the text encoder that a Q-Former starts from; None for other projectors."""
    from models.config import QFormerProjector

    return find_part(model.projector.path).config if isinstance(model.projector, QFormerProjector) else None


def find_part_of(config: VisionConfig | LanguageConfig) -> PartFacts:
    """The configuration of a part of a recipe; of a new decoder, whose directory is its tokenizer's."""
    from models.config import DecoderLanguage, OpenClipVision
    from models.language import decoder_facts
    from models.vision_open_clip import clip_shape

    if isinstance(config, OpenClipVision):
        weights = Path(config.weights)
        return PartFacts(
            clip_shape(config), f"open_clip {config.architecture}", weights.parent if weights.is_file() else None
        )
    if isinstance(config, DecoderLanguage):
        tokenizer = find_part(config.tokenizer)
        facts = decoder_facts(config, int(tokenizer.config["vocab_size"]) + 1)  # and the image token
        return PartFacts(facts, f"a new decoder; its vocabulary: {tokenizer.source}", tokenizer.directory)
    return find_part(config.path)


@dataclass(frozen=True)
class PartCount:
    """Parameters of one part: those that stay as they are, and those that learn (adapters included)."""

    frozen: int
    trained: int
    quantizable: int = 0
    """Elements of the frozen linears that `load: nf4` or `int8` shrinks."""


def count_parts(
    model: ModelConfig, vision: Mapping[str, Any], language: Mapping[str, Any], plan: TuningPlan
) -> dict[str, PartCount]:
    """`PartCount` of vision, projector and language, exact."""
    import torch
    from transformers import AutoModelForCausalLM

    import models.own_decoder  # noqa: F401 - makes its configuration known
    from models.anyres import with_newline
    from models.future import build_future
    from models.projectors import build_projector

    with torch.device("meta"):
        seen = _vision_module(model, dict(vision))
        decoder = AutoModelForCausalLM.from_config(_config(dict(language)))
        width = decoder.config.hidden_size
        projector = build_projector(model.projector, seen.config.hidden_size, width, text_facts=text_facts(model))
        projector = with_newline(projector, model.image, width)
        future = build_future(model.future, decoder.config) if model.future is not None else None
    return {
        "vision": _count(seen, plan.vision),
        "projector": _count(projector, plan.projector),
        "language": _count(decoder, plan.language),
        **({"future": _count(future, plan.future)} if future is not None else {}),
    }


def _vision_module(model: ModelConfig, facts: dict[str, Any]) -> Any:
    import transformers

    from models.vision import FAMILIES

    facts = facts.get("vision_config", facts)
    model_class = getattr(transformers, FAMILIES[model.vision.kind].class_name)
    return model_class(model_class.config_class(**{k: v for k, v in facts.items() if k != "model_type"}))


def _config(facts: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    kind = facts.pop("model_type")
    facts.pop("quantization_config", None)
    return AutoConfig.for_model(kind, **facts)


def _count(module: nn.Module, tuning: Frozen | Full | Lora) -> PartCount:
    from torch import nn

    total = sum(parameter.numel() for parameter in module.parameters())
    linears = {
        name: each for name, each in module.named_modules() if isinstance(each, nn.Linear) and "lm_head" not in name
    }
    if isinstance(tuning, Full):
        from trainer.tuning import is_inside

        kept = [
            value.numel()
            for name, value in module.named_parameters()
            if any(is_inside(f"part.{name}", "part", chosen) for chosen in tuning.frozen)
        ]
        return PartCount(sum(kept), total - sum(kept))
    quantizable = sum(each.weight.numel() for each in linears.values())
    if not isinstance(tuning, Lora):
        return PartCount(total, 0, quantizable)
    everything = tuning.targets == "all_linear"
    adapted = [each for name, each in linears.items() if everything or name.rpartition(".")[2] in tuning.targets]
    adapters = tuning.rank * sum(each.in_features + each.out_features for each in adapted)
    return PartCount(total, adapters, quantizable)
