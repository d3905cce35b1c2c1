"""Our parts under the names that the ecosystem knows: `LlavaForConditionalGeneration` and its processor.

    vision.model.X      -> vision_tower.vision_model.X (clip, siglip) or vision_tower.X (dinov2, vit)
    projector.linear_1  -> multi_modal_projector.linear_1
    projector.newline   -> image_newline, of `LlavaNextForConditionalGeneration`, which AnyRes makes it
    projector.X         -> multi_modal_projector.X of our own class (`models.registered`) for every other projector
    language.X          -> language_model.X

A single linear projector becomes linear_1 with an identity activation and linear_2 = the identity matrix: exact in any
precision, since each output is one product by 1 and sums of 0. Names are those of the classic hub layout, which
transformers renames on load and vLLM reads as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from models.build import Facts
from models.config import (
    DecoderLanguage,
    LinearProjector,
    MlpProjector,
    ModelConfig,
    PretrainedLanguage,
    QFormerProjector,
    VisionConfig,
)
from models.language import decoder_shape
from models.source import directory_of, read_json
from models.spec import IMAGE_TOKEN, AnyResImage, ImageSpec, PadImage
from models.vision import FAMILIES

HAS_INNER_MODEL = frozenset({"clip", "siglip", "open_clip"})
"""Encoders whose hub checkpoints keep their weights under `vision_model.`."""


def vision_name(kind: str, name: str) -> str:
    """The exported name of a parameter of the vision model, by its name there."""
    return f"vision_tower.vision_model.{name}" if kind in HAS_INNER_MODEL else f"vision_tower.{name}"


def names_in_file(name: str) -> tuple[str, ...]:
    """The names that a parameter of stock `LlavaForConditionalGeneration` may have in a bundle's files."""
    if name.startswith("lm_head."):
        return (f"language_model.{name}", "language_model.model.embed_tokens.weight")
    part, _, rest = name.removeprefix("model.").partition(".")
    if not rest:
        return (part,)
    if part == "vision_tower":
        return (f"{part}.vision_model.{rest}", f"{part}.{rest}")
    return (f"language_model.model.{rest}",) if part == "language_model" else (f"{part}.{rest}",)


def projector_tensors(config: ModelConfig, weights: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The projector's weights under their exported names; a single linear layer becomes linear_1 and linear_2."""
    prefix = "multi_modal_projector"
    if isinstance(config.image, AnyResImage):
        yield "image_newline", weights["newline.weight"]
    if isinstance(config.projector, LinearProjector):
        width = weights["linear.weight"].shape[0]
        yield f"{prefix}.linear_1.weight", weights["linear.weight"]
        yield f"{prefix}.linear_1.bias", weights["linear.bias"]
        yield f"{prefix}.linear_2.weight", torch.eye(width)
        yield f"{prefix}.linear_2.bias", torch.zeros(width)
        return
    for name, value in weights.items():
        if name != "newline.weight" and ".text." not in f".{name}":  # the Q-Former's text side is for training alone
            yield f"{prefix}.{name}", value


def with_image_row(name: str, value: Tensor, num_rows: int) -> Tensor:
    """The embedding or the head with rows added for the image token, each the mean of all rows.

    A mean row's logit is the mean of all logits, so it is never the largest: greedy answers stay what they were.
    """
    is_vocabulary = name.endswith(("embed_tokens.weight", "lm_head.weight"))
    if not is_vocabulary or value.shape[0] >= num_rows:
        return value
    mean = value.mean(dim=0, keepdim=True, dtype=torch.float32).to(value.dtype)
    return torch.cat([value, mean.expand(num_rows - value.shape[0], -1)])


def num_vocabulary_rows(facts: Facts) -> int:
    """Rows of the exported embedding: the language model's own, and at least one for the image token."""
    return max(facts.text.vocab_size, facts.text.image_token_id + 1)


def llava_config(config: ModelConfig, facts: Facts, dtype: torch.dtype, vision: Any) -> Any:
    """A `LlavaConfig`; under AnyRes a `LlavaNextConfig`; our own of either for parts that neither has a place for.

    `vision` is the configuration of the encoder in transformers.
    """
    import models.own_decoder  # noqa: F401 - makes its configuration known

    language = language_config(config, facts)
    language.vocab_size = num_vocabulary_rows(facts)
    language.use_cache = True
    config_class, more = _config_class(config)
    llava = config_class(
        vision_config=copy.deepcopy(vision),
        text_config=language,
        image_token_id=facts.text.image_token_id,
        projector_hidden_act="linear" if isinstance(config.projector, LinearProjector) else "gelu",
        vision_feature_layer=config.vision.feature_layer,
        vision_feature_select_strategy=_select_strategy(config.vision),
        image_seq_length=facts.image.num_projected_tokens or facts.image.num_features,
        tie_word_embeddings=bool(language.tie_word_embeddings),
        **more,
    )
    llava.architectures = [config_class.__name__.replace("Config", "ForConditionalGeneration")]
    llava.dtype = dtype
    return llava


def language_config(config: ModelConfig, facts: Facts) -> Any:
    """The language model's own configuration, pretrained or new."""
    from transformers import AutoConfig

    if isinstance(config.language, DecoderLanguage):
        return decoder_shape(config.language, facts.tokenizer)
    return AutoConfig.from_pretrained(directory_of(config.language.path))


def _config_class(config: ModelConfig) -> tuple[Any, dict[str, Any]]:
    """The class of the exported configuration, and the values that only it has."""
    from transformers import LlavaConfig, LlavaNextConfig

    from models.registered import SightlineConfig, SightlineNextConfig

    is_anyres = isinstance(config.image, AnyResImage)
    more: dict[str, Any] = {}
    if isinstance(config.image, AnyResImage):
        more["image_grid_pinpoints"] = [list(pinpoint) for pinpoint in config.image.pinpoints]
    is_stock = config.future is None and isinstance(config.language, PretrainedLanguage)
    if config.future is not None:
        more["future"] = config.future.model_dump(mode="json")
    if not isinstance(config.projector, LinearProjector | MlpProjector):
        is_stock, more["projector"] = False, config.projector.model_dump(mode="json")
        if isinstance(config.projector, QFormerProjector):
            more["projector_text"] = read_json(directory_of(config.projector.path), "config.json")
    if is_stock:
        return (LlavaNextConfig if is_anyres else LlavaConfig), more
    return (SightlineNextConfig if is_anyres else SightlineConfig), more


def _select_strategy(vision: VisionConfig) -> str:
    """Llava's `default` drops one leading token, `full` drops none."""
    return "default" if FAMILIES[vision.kind].num_leading_tokens and not vision.keep_cls else "full"


def image_processor(spec: ImageSpec) -> Any:
    """The stock image processor whose pixels equal those of training, with Pillow.

    It pads with int(255 * mean), so black asks for a mean below 1/255: pixels, mean and deviation are all taken 1/256
    of what they are, a power of two, by which every normalised pixel stays the same to the last bit.
    """
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    is_black = isinstance(spec.fit, PadImage) and spec.fit.colour == "black"
    scale = 1 / 256 if is_black else 1.0
    common = {
        "size": {"shortest_edge": spec.size},
        "crop_size": {"height": spec.size, "width": spec.size},
        "rescale_factor": scale / 255,
        "image_mean": [scale * value for value in spec.mean],
        "image_std": [scale * value for value in spec.std],
        "resample": 3,  # bicubic
    }
    if isinstance(spec.fit, AnyResImage):
        return LlavaNextImageProcessorPil(image_grid_pinpoints=[list(each) for each in spec.fit.pinpoints], **common)
    if not isinstance(spec.fit, PadImage):
        return CLIPImageProcessorPil(**common)
    return LlavaImageProcessorPil(do_pad=True, **common)


def processor(config: ModelConfig, facts: Facts, chat_template: str) -> Any:
    """A `LlavaProcessor` (`LlavaNextProcessor`) with the tokenizer, image processor and chat template of training."""
    from transformers import LlavaNextProcessor, LlavaProcessor

    processor_class = LlavaNextProcessor if isinstance(config.image, AnyResImage) else LlavaProcessor
    return processor_class(
        image_processor=image_processor(facts.image),
        tokenizer=facts.tokenizer,
        image_token=IMAGE_TOKEN,
        chat_template=chat_template,
        **_token_count(config.vision, facts.image),
    )


def _token_count(vision: VisionConfig, spec: ImageSpec) -> dict[str, Any]:
    """By what a processor counts a picture's tokens: patches and leading tokens, less one with `default`.

    Where the projector makes N tokens of a picture, the picture counts as one patch with N - 1 tokens before it.
    """
    if spec.num_projected_tokens is not None:
        return {
            "patch_size": spec.size,
            "vision_feature_select_strategy": "full",
            "num_additional_image_tokens": spec.num_projected_tokens - 1,
        }
    return {
        "patch_size": spec.patch_size,
        "vision_feature_select_strategy": _select_strategy(vision),
        "num_additional_image_tokens": FAMILIES[vision.kind].num_leading_tokens,
    }


def generation_config(facts: Facts, stop_id: int) -> Any:
    """Greedy by default, ending at the tokenizer's end token or at the token that ends the template's turn.

    By its id, since a text is not always a token's name: a line feed, which ends plain captions, is `<0x0A>` to Llama.
    """
    from transformers import GenerationConfig

    ends = {facts.tokenizer.eos_token_id, stop_id} - {None}
    return GenerationConfig(do_sample=False, eos_token_id=sorted(ends), pad_token_id=facts.text.pad_token_id)
