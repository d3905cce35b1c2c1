"""Our parts under the names that the ecosystem knows: `LlavaForConditionalGeneration` and its processor.

    vision.model.X      -> vision_tower.vision_model.X (clip, siglip) or vision_tower.X (dinov2, vit)
    projector.newline   -> image_newline, of `LlavaNextForConditionalGeneration`, which AnyRes makes it
    projector.X         -> multi_modal_projector.X, or what `ProjectorConfig.export_tensors` makes of it: of stock
                           Llava, or of our own class (`models.registered`) for parts that stock Llava cannot represent
    language.X          -> language_model.X

Names are those of the classic hub layout, which transformers renames on load and vLLM reads as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from models.build import ModelMetadata
from models.config import ModelSource
from models.encoders.base import EncoderConfig
from models.mtp.base import MTP_HEADS
from models.opening import open_processor
from models.projectors.base import PROJECTORS
from models.scaled_head import is_scaled
from models.spec import IMAGE_TOKEN, ImageSpec, PadImage


def names_in_file(name: str) -> tuple[str, ...]:
    """The names that a parameter of a stock class (`LlavaForConditionalGeneration`) may have in a model's files.

    Those of the classic layout, and those that transformers has had in some versions since.
    """
    if name.startswith("lm_head."):
        tied = ("language_model.model.embed_tokens.weight", "model.language_model.embed_tokens.weight")
        return (f"language_model.{name}", name, *tied, "model.embed_tokens.weight")
    part, _, rest = name.removeprefix("model.").partition(".")
    if not rest:
        return part, name
    if part == "vision_tower":
        plain = f"{part}.{rest}"
        return (
            f"{part}.vision_model.{rest}",
            plain,
            plain.replace(".model.", ".", 1),
            *(hub_name(plain, tower) for tower in _OF_TOWERS),
            f"model.{part}.vision_model.{rest}",
            name,
        )
    if part == "language_model":
        return f"language_model.model.{rest}", name, f"model.{rest}"
    return f"{part}.{rest}", name


_ATTENTION = (
    (".attention.q_proj.", ".attention.attention.query."),
    (".attention.k_proj.", ".attention.attention.key."),
    (".attention.v_proj.", ".attention.attention.value."),
    (".attention.o_proj.", ".attention.output.dense."),
)
_OF_TOWERS: Mapping[str, Sequence[tuple[str, str]]] = {
    "dinov2": _ATTENTION,
    "vit": (
        ("vision_tower.layers.", "vision_tower.encoder.layer."),
        *_ATTENTION,
        (".mlp.fc1.", ".intermediate.dense."),
        (".mlp.fc2.", ".output.dense."),
    ),
}
"""By a tower's `model_type`: pieces of names in transformers 5 -> on the hub, in 4.57 and before. Source: transformers'
conversion_mapping.py, `Dinov2Model` and `ViTModel`."""


def hub_name(name: str, tower: str) -> str:
    """The hub's name of a bundle's tensor; transformers 5 renames some of a tower's, by its `model_type`, 4.57 none."""
    if name.startswith("vision_tower."):
        for ours, theirs in _OF_TOWERS.get(tower, ()):
            name = name.replace(ours, theirs)
    return name


def projector_tensors(config: ModelSource, weights: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The projector's weights, and its newline, under their exported names."""
    prefix = "multi_modal_projector"
    weights = dict(weights)
    if config.image.is_tiled:
        yield "image_newline", weights.pop("newline.weight")
    for name, value in config.projector.export_tensors(weights):
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


def num_vocabulary_rows(facts: ModelMetadata) -> int:
    """Rows of the exported embedding: the language model's own, and at least one for the image token."""
    return max(facts.text.vocab_size, facts.text.image_token_id + 1)


def llava_config(config: ModelSource, facts: ModelMetadata, dtype: torch.dtype, vision: Any) -> Any:
    """A `LlavaConfig`; under AnyRes a `LlavaNextConfig`; our subclass of either for parts that neither can represent.

    `vision` is the configuration of the encoder in transformers.
    """
    import models.scratch_decoder  # noqa: F401 - makes its configuration known

    language = config.language.transformers_config(facts.tokenizer)
    language.vocab_size = num_vocabulary_rows(facts)
    language.use_cache = True
    config_class, more = _config_class(config, language)
    llava = config_class(
        vision_config=copy.deepcopy(vision),
        text_config=language,
        image_token_id=facts.text.image_token_id,
        projector_hidden_act=config.projector.llava_activation or "gelu",
        vision_feature_layer=config.vision.feature_layer,
        vision_feature_select_strategy=config.vision.select_strategy,
        image_seq_length=facts.image.num_projected_tokens or facts.image.num_features,
        tie_word_embeddings=bool(language.tie_word_embeddings),
        **more,
    )
    llava.architectures = [config_class.__name__.replace("Config", "ForConditionalGeneration")]
    for part in (llava, *(getattr(llava, key) for key in llava.sub_configs)):  # each base came with one of its own
        part.dtype = dtype
    return llava


def _config_class(config: ModelSource, language: Any) -> tuple[Any, dict[str, Any]]:
    """The class of the exported configuration, and the values that stock Llava's lacks."""
    from transformers import LlavaConfig, LlavaNextConfig

    from models.registered import SightlineConfig, SightlineNextConfig

    own = config.projector.export_config()
    if config.future is not None:
        own["future"] = config.future.model_dump(mode="json")
    if config.vision.num_registers:
        own["num_register_tokens"] = config.vision.num_registers
    is_stock = not own and not config.language.is_new and not is_scaled(language)
    if not is_stock:
        own |= _packages(config)
    if config.image.is_tiled:
        own["image_grid_pinpoints"] = [list(pinpoint) for pinpoint in config.image.pinpoints]
        return (LlavaNextConfig if is_stock else SightlineNextConfig), own
    return (LlavaConfig if is_stock else SightlineConfig), own


def _packages(config: ModelSource) -> dict[str, Any]:
    """The packages of parts that are not ours: they are needed to open the bundle."""
    found = {PROJECTORS.group: PROJECTORS.package(config.projector.kind)}
    if config.future is not None:
        found[MTP_HEADS.group] = MTP_HEADS.package(config.future.kind)
    packages = {group: package for group, package in found.items() if package is not None}
    return {"packages": packages} if packages else {}


def image_processor(spec: ImageSpec) -> Any:
    """The stock image processor whose pixels equal those of training, with Pillow.

    It pads with int(255 * mean), so black needs a mean below 1/255. Pixels, mean and deviation are therefore all
    divided by 256; since that is a power of two, every normalised pixel stays the same to the last bit.
    """
    scale = 1 / 256 if spec.fit == PadImage(colour="black") else 1.0
    common = {
        "size": {"shortest_edge": spec.size},
        "crop_size": {"height": spec.size, "width": spec.size},
        "rescale_factor": scale / 255,
        "image_mean": [scale * value for value in spec.mean],
        "image_std": [scale * value for value in spec.std],
        "resample": 3,  # bicubic
    }
    return _IMAGE_PROCESSORS[spec.fit.kind](spec, common)


def _crop_processor(spec: ImageSpec, common: dict[str, Any]) -> Any:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    del spec
    return CLIPImageProcessorPil(**common)


def _pad_processor(spec: ImageSpec, common: dict[str, Any]) -> Any:
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    del spec
    return LlavaImageProcessorPil(do_pad=True, **common)


def _stretch_processor(spec: ImageSpec, common: dict[str, Any]) -> Any:
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    values = {name: value for name, value in common.items() if name not in ("size", "crop_size")}
    return SiglipImageProcessorPil(size={"height": spec.size, "width": spec.size}, **values)


def _anyres_processor(spec: ImageSpec, common: dict[str, Any]) -> Any:
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    return LlavaNextImageProcessorPil(image_grid_pinpoints=[list(each) for each in spec.fit.pinpoints], **common)


_IMAGE_PROCESSORS = {
    "crop": _crop_processor,
    "pad": _pad_processor,
    "stretch": _stretch_processor,
    "anyres": _anyres_processor,
}


def processor(config: ModelSource, facts: ModelMetadata, chat_template: str) -> Any:
    """A `LlavaProcessor` (`LlavaNextProcessor`) with the tokenizer, image processor and chat template of training.

    Of a model that is published as a whole, its own processor with that template.
    """
    if config.layout is not None:
        own = open_processor(config.layout)
        own.chat_template = chat_template
        fit = facts.image.fit
        if fit.grid is not None:
            size = {"shortest_edge": fit.min_pixels, "longest_edge": fit.max_pixels}
            own.image_processor.size = type(own.image_processor.size)(**size)
        return own
    from transformers import LlavaNextProcessor, LlavaProcessor

    processor_class = LlavaNextProcessor if config.image.is_tiled else LlavaProcessor
    return processor_class(
        image_processor=image_processor(facts.image),
        tokenizer=facts.tokenizer,
        image_token=IMAGE_TOKEN,
        chat_template=chat_template,
        **_token_count(config.vision, facts.image),
    )


def _token_count(vision: EncoderConfig, spec: ImageSpec) -> dict[str, Any]:
    """The values by which a processor counts an image's tokens: patches and leading tokens, less one with `default`.

    Where the projector makes N tokens of an image, the image counts as one patch with N - 1 tokens before it.
    """
    if spec.num_projected_tokens is not None:
        return {
            "patch_size": spec.size,
            "vision_feature_select_strategy": "full",
            "num_additional_image_tokens": spec.num_projected_tokens - 1,
        }
    return {
        "patch_size": spec.patch_size,
        "vision_feature_select_strategy": vision.select_strategy,
        "num_additional_image_tokens": vision.vision_class.num_leading_tokens - vision.num_registers,
    }


def generation_config(facts: ModelMetadata, stop_id: int) -> Any:
    """Greedy by default, ending at the tokenizer's end token or at the token that ends the template's turn.

    The token is given by id, since its text is not always its name: a line feed, which ends plain captions, is `<0x0A>`
    in Llama's vocabulary.
    """
    from transformers import GenerationConfig

    ends = {facts.tokenizer.eos_token_id, stop_id} - {None}
    return GenerationConfig(do_sample=False, eos_token_id=sorted(ends), pad_token_id=facts.text.pad_token_id)
