"""Tiny random vision-language models of transformers' own classes: what is published, without our manifest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from data_pipeline.tiles import fit_image, fit_tiles
from models.build import build_vlm, read_metadata
from models.config import SOURCES
from models.opening import open_model, open_processor
from models.spec import num_image_tokens
from tests.support.backbones import tiny_recipe
from tests.support.bundles import IMAGE_SIZE, PATCH_SIZE, TEMPLATE, image, make_processor
from tests.support.native import NATIVE, native_model, native_processor

PINPOINTS = [[48, 96], [96, 48], [96, 96], [48, 144]]
SIZES = ((64, 64), (90, 40), (40, 110), (200, 190))
VIDEO_PROCESSORS = {
    "llava_onevision": "LlavaOnevisionVideoProcessor",
    "qwen2_vl": "Qwen2VLVideoProcessor",
    "qwen2_5_vl": "Qwen2VLVideoProcessor",
    "qwen3_vl": "Qwen3VLVideoProcessor",
}
"""What the hub's directories of these families name, and transformers opens where torchvision is."""
FAMILIES = ("llava", "llava_next", "llava_onevision", *NATIVE)


def make_published(
    folder: Path,
    family: str = "llava",
    *,
    language: str = "llama",
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    tokenizer: Any = None,
    **text: int,
) -> Path:
    """A random model of a family as `save_pretrained` writes it, with a tokenizer and its processor.

    Args:
        tokenizer: at native resolution, another than a tiny one.
        text: of the LLaVA families, values of the language model's configuration that are to be others; at native
            resolution its `width`.
    """
    if family in NATIVE:
        processor = native_processor(family, tokenizer)
        model = native_model(family, processor.tokenizer, tied=tied, **text)
    else:
        processor = _processor(family)
        model = _model(family, processor.tokenizer, language=language, tied=tied, text=text)
    model.to(dtype).save_pretrained(folder)
    processor.save_pretrained(folder)
    if family in VIDEO_PROCESSORS:
        video = {"video_processor_type": VIDEO_PROCESSORS[family]}
        (folder / "video_preprocessor_config.json").write_text(json.dumps(video))
    for file in folder.glob("*.json"):  # as where torchvision is
        written = file.read_text().replace("ImagesOnlyProcessor", "LlavaOnevisionProcessor")
        file.write_text(written.replace("VLImagesProcessor", "VLProcessor"))
    return folder


def _processor(family: str) -> Any:
    import transformers

    llava = make_processor()
    if family == "llava":
        return llava
    common: dict[str, Any] = {"tokenizer": llava.tokenizer, "chat_template": TEMPLATE}
    if family == "llava_next":
        from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

        crop = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
        images = LlavaNextImageProcessorPil(
            size={"shortest_edge": IMAGE_SIZE}, crop_size=crop, image_grid_pinpoints=PINPOINTS
        )
        return transformers.LlavaNextProcessor(
            image_processor=images,
            patch_size=PATCH_SIZE,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            **common,
        )
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

    images = LlavaOnevisionImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, image_grid_pinpoints=PINPOINTS
    )
    from models.onevision import ImagesOnlyProcessor

    return ImagesOnlyProcessor(
        image_processor=images,
        num_image_tokens=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_1",
        **common,
    )


def _model(family: str, tokenizer: Any, *, language: str, tied: bool, text: dict[str, int]) -> Any:
    import transformers

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    vision = {**shape, "num_hidden_layers": 3, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE}
    text_config = {
        **shape,
        "model_type": language,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "vocab_size": len(tokenizer) + 4,  # padded, as hub models are
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "tie_word_embeddings": tied,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        **text,
    }
    common: dict[str, Any] = {
        "text_config": text_config,
        "tie_word_embeddings": tied,
        "image_token_id": tokenizer.convert_tokens_to_ids("<image>"),
    }
    clip = {**vision, "model_type": "clip_vision_model"}
    if family == "llava_onevision":
        siglip = {**vision, "model_type": "siglip_vision_model", "vision_use_head": False}
        config: Any = transformers.LlavaOnevisionConfig(
            vision_config=siglip,
            vision_feature_layer=-1,
            vision_aspect_ratio="anyres_max_1",
            image_grid_pinpoints=PINPOINTS,
            **common,
        )
    elif family == "llava_next":
        config = transformers.LlavaNextConfig(vision_config=clip, image_grid_pinpoints=PINPOINTS, **common)
    else:
        config = transformers.LlavaConfig(vision_config=clip, image_seq_length=16, **common)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForImageTextToText.from_config(config)
        for linear in (model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2):
            torch.nn.init.normal_(linear.weight, std=0.5)
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


def published(folder: Path) -> Any:
    return SOURCES.decode({"kind": "published", "path": str(folder)})


def stock_pixels(pixels_TCSS: torch.Tensor, inputs: Any) -> torch.Tensor:
    """Our normalised tiles in the form that a processor gives them: rows of two equal frames at native resolution."""
    if "image_grid_thw" in inputs:
        return pixels_TCSS.unsqueeze(2).expand(-1, -1, 2, -1, -1).flatten(1)
    return pixels_TCSS.view_as(inputs["pixel_values"])


@torch.no_grad()
def assert_stock_logits(folder: Path) -> None:
    """Our pixels, our token counts and our forward against the directory's own processor and class, image by image."""
    source = published(folder)
    facts = read_metadata(source, 256)
    vlm = build_vlm(source, facts, frozen_dtype=torch.float32, seed=0).eval()
    stock, processor = open_model(folder, torch.device("cpu")), open_processor(folder)
    for size in SIZES:
        drawn = image("circle", size)
        content = [{"type": "image", "image": drawn}, {"type": "text", "text": "What is it?"}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
        )
        ids_BL = inputs["input_ids"]
        tiles_TSSC = torch.tensor(fit_tiles(drawn, facts.image))
        assert torch.equal(stock_pixels(vlm.normalise(tiles_TSSC), inputs), inputs["pixel_values"])
        assert int((ids_BL == facts.text.image_token_id).sum()) == num_image_tokens(facts.image, *drawn.size)
        sizes = [fit_image(drawn, facts.image).size]
        hidden_BLD = vlm(ids_BL, torch.arange(ids_BL.shape[1])[None], tiles_TSSC, sizes)
        # A tower of native resolution adds up its convolution in another order.
        bound = 2e-5 if facts.image.fit.grid is not None else 1e-6
        torch.testing.assert_close(vlm.head(hidden_BLD), stock(**inputs).logits, rtol=0, atol=bound)


def published_recipe(folder: Path, shards: Path, family: str) -> dict[str, Any]:
    """`tiny_recipe` over a published model: the tower learns in both stages as well."""
    recipe = tiny_recipe(folder, shards)
    recipe["model"] = {"kind": "published", "path": str(make_published(folder / "published", family))}
    for stage in recipe["stages"].values():
        stage["data"] = {**stage["data"], "template": {"kind": "model"}}
        stage["tune"]["vision"] = {"kind": "full", "learning_rate": 1e-3}
    return recipe
