"""The shapes of a recipe's pretrained parts, even if their weights are not on this machine.

Owns finding each part's config.json (its directory, the hub's cache, the facts of well-known models below) and counting
parameters exactly: the parts are built on PyTorch's meta device, which has shapes and no memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.common.documents import read_json
from models.common.errors import InputError
from models.common.source import PartFacts, local_directory
from models.languages.base import FrozenFormat
from models.languages.nf4 import layers_left_whole
from trainer.config.tuning import Frozen, Full, Lora, TuningPlan

if TYPE_CHECKING:
    from torch import nn

    from models.config import ModelSource

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

_QWEN_VL: dict[str, Any] = {"image_token_id": 151655, "video_token_id": 151656}

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
    "Qwen/Qwen2.5-VL-3B-Instruct": {
        **_QWEN_VL,
        "model_type": "qwen2_5_vl",
        "tie_word_embeddings": True,
        "text_config": {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128000,
            "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        },
        "vision_config": {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 2048,
        },
    },
    "Qwen/Qwen3-VL-4B-Instruct": {
        **_QWEN_VL,
        "model_type": "qwen3_vl",
        "tie_word_embeddings": True,
        "text_config": {
            "vocab_size": 151936,
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 262144,
            "rope_scaling": {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True},
        },
        "vision_config": {
            "depth": 24,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_heads": 16,
            "out_hidden_size": 2560,
            "deepstack_visual_indexes": [5, 11, 17],
        },
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


def find_part(path: str) -> PartFacts:
    """The configuration of the part at `path`, a directory or a hub name; nothing is downloaded.

    Raises InputError if neither the machine nor the table of well-known models has it.
    """
    local = local_directory(path)
    if local is not None:
        return PartFacts(read_json(local, "config.json"), str(local / "config.json"), local)
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(path, "config.json") if path.count("/") == 1 else None
    if isinstance(cached, str):
        folder = Path(cached).parent
        complete = any(folder.glob("*.safetensors"))
        return PartFacts(read_json(folder, "config.json"), cached, folder if complete else None)
    if path in KNOWN:
        return PartFacts(KNOWN[path], f"{path}: not on this machine; its published shapes", None)
    raise InputError(f"{path}: no such directory, not in the hub's cache, and its shapes are not known here")


@dataclass(frozen=True)
class PartCount:
    """Parameters of one part: the frozen ones, and the trained ones (adapters included)."""

    frozen: int
    trained: int
    quantizable: int = 0
    """Elements of the frozen linears that the part's `load` (`nf4` or `int8`) shrinks."""
    unused: int = 0
    """Of the frozen ones, those of an encoder's layers above the feature layer, which no forward runs."""


def count_parts(model: ModelSource, plan: TuningPlan) -> dict[str, PartCount]:
    """`PartCount` of vision, projector, language and, where there are any, heads for further tokens; exact.

    Raises InputError where a part's shapes are not known here, or the plan names a module that is not there.
    """
    import torch
    from transformers import AutoModelForCausalLM

    import models.scratch_decoder  # noqa: F401 - makes its configuration known
    from models.anyres import with_newline
    from models.mtp.heads import build_heads

    with torch.device("meta"):
        vision = model.vision.without_weights(find_part)
        vision_width = model.vision.shape(find_part).width
        config = _config(dict(model.language.facts(find_part).config))
        decoder = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        width = decoder.config.hidden_size
        projector = model.projector.build(vision_width, width, find_part)
        projector = with_newline(projector, model.image, width)
        mtp = build_heads(model.future, decoder.config) if model.future is not None else None
    return {
        "vision": _count_encoder(vision, plan.vision, model.vision.shape(find_part).num_layers),
        "projector": _count(projector, "projector", plan.projector),
        "language": _count(decoder, "language", plan.language, model.language.frozen_format),
        **({"future": _count(mtp, "future", plan.future)} if mtp is not None else {}),
    }


def _config(facts: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    kind = facts.pop("model_type")
    facts.pop("quantization_config", None)
    return AutoConfig.for_model(kind, **facts)


def _count(module: nn.Module, part: str, tuning: Frozen | Full | Lora, load: FrozenFormat = "full") -> PartCount:
    from trainer.engine.tuning import adapted_modules, check_names

    check_names(module, part, tuning)
    total = sum(parameter.numel() for parameter in module.parameters())
    if isinstance(tuning, Full):
        trained = sum(value.numel() for value in _learning(module, tuning))
        return PartCount(total - trained, trained)
    quantizable = _num_quantizable(module, load)
    if not isinstance(tuning, Lora):
        return PartCount(total, 0, quantizable)
    sizes = [next(each.parameters()).shape for each in adapted_modules(module, tuning).values()]
    adapters = tuning.rank * sum(sum(size) for size in sizes)
    return PartCount(total, adapters, quantizable)


def _count_encoder(encoder: Any, tuning: Frozen | Full | Lora, num_layers: int) -> PartCount:
    """An encoder's count; the layers above its first `num_layers` never run, and do not learn.

    `models.vision` runs all of them where the features are the embedding or what comes last.
    """
    from models.vision import layers_within

    count, total = _count(encoder, "vision", tuning), int(getattr(encoder.config, "num_hidden_layers", num_layers))
    if num_layers in (0, total):
        return count
    _, _, layers = layers_within(encoder, total)
    upper = {id(value): value.numel() for layer in layers[num_layers:] for value in layer.parameters()}
    idle = sum(upper[id(value)] for value in _learning(encoder, tuning) if id(value) in upper)
    return PartCount(count.frozen + idle, count.trained - idle, unused=sum(upper.values()))


def _learning(module: nn.Module, tuning: Frozen | Full | Lora) -> Iterator[nn.Parameter]:
    """A part's own weights that a plan trains in full."""
    from trainer.engine.tuning import is_inside

    if isinstance(tuning, Full):
        for name, value in module.named_parameters():
            if not any(is_inside(f"part.{name}", "part", kept) for kept in tuning.frozen):
                yield value


def _num_quantizable(module: nn.Module, load: FrozenFormat) -> int:
    """Elements of the linear layers that `load` quantizes."""
    from torch import nn

    if load == "full":
        return 0
    whole = layers_left_whole(module, ["lm_head"]) if load == "nf4" else []
    return sum(
        each.weight.numel()
        for name, each in module.named_modules()
        if isinstance(each, nn.Linear) and "lm_head" not in name and name not in whole
    )
