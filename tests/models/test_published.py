"""A published model falls apart into our parts, which compute what the stock class computes, and nothing else opens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from data_pipeline.config import ModelTemplate
from data_pipeline.encode import Encoder
from data_pipeline.record import Record, Turn
from data_pipeline.templates import build_template
from data_pipeline.tokens import Tokens
from models.anyres import real_tiles
from models.build import build_vlm, read_metadata
from models.common.errors import InputError
from models.common.sharded import ShardedWriter, TensorFiles
from models.config import ModelConfig
from models.opening import open_model, open_processor
from models.published.model import PublishedModel
from models.published.names import NEWLINE, place_of
from tests.support.bundles import image, make_bundle
from tests.support.native import stock_content
from tests.support.native_pair import png
from tests.support.published import FAMILIES, assert_stock_logits, make_published, published


@pytest.mark.parametrize("family", FAMILIES)
def test_a_published_model_computes_what_its_own_class_does(tmp_path: Path, family: str) -> None:
    assert_stock_logits(make_published(tmp_path / family, family))


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision"])
def test_several_images_are_encoded_and_read_as_its_own_classes_do(tmp_path: Path, family: str) -> None:
    """LLaVA-OneVision makes of each one square alone where a prompt has several."""
    folder = make_published(tmp_path / family, family)
    source = published(folder)
    facts = read_metadata(source, 512)
    vlm = build_vlm(source, facts, frozen_dtype=torch.float32, seed=0).eval()
    stock, processor = open_model(folder, torch.device("cpu")), open_processor(folder)
    drawn = [image("circle", size) for size in ((61, 40), (30, 90), (47, 47))]
    tokens = Tokens.of(facts.tokenizer, facts.text.image_token)
    encoder = Encoder([], build_template(ModelTemplate(), tokens), tokens, facts.image, 512)
    turns = (Turn("user", "<image>\nIs it <image>\nor <image>\n?"), Turn("assistant", "A circle."))
    encoding = encoder.encode_record(Record(tuple(png(each) for each in drawn), turns))
    words: dict[str, Any] = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    content = stock_content(turns[0].text, drawn)
    inputs = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, **words)
    prompt = inputs.pop("input_ids")[0].tolist()
    assert encoding.input_ids[: len(prompt)].tolist() == prompt
    tiles = torch.from_numpy(encoding.tiles)
    sizes = torch.tensor(encoding.image_sizes) if facts.image.fit.is_tiled else None
    assert torch.equal(vlm.normalise(tiles), real_tiles(facts.image, inputs["pixel_values"], sizes)[0])
    ids_BL = torch.tensor(encoding.input_ids, dtype=torch.int64)[None]
    inputs["attention_mask"] = torch.ones_like(ids_BL)
    with torch.no_grad():
        hidden_BLD = vlm(ids_BL, torch.arange(ids_BL.shape[1])[None], tiles, encoding.image_sizes)
        torch.testing.assert_close(vlm.head(hidden_BLD), stock(input_ids=ids_BL, **inputs).logits, rtol=0, atol=2e-5)


def test_a_bundle_of_ours_is_opened_in_the_same_way(tmp_path: Path) -> None:
    assert_stock_logits(make_bundle(tmp_path / "bundle"))


def test_names_of_later_versions_are_the_same_model(tmp_path: Path) -> None:
    """transformers 4.52 and some later versions wrote the names that a model has in memory."""
    folder = make_published(tmp_path / "llava_next", "llava_next")
    files = TensorFiles.open(folder)
    tensors = {name: files.read(name) for name in files}
    writer = ShardedWriter(folder)
    for name, value in tensors.items():
        later = name.replace("language_model.model.", "model.language_model.").replace("language_model.lm", "lm")
        writer.add(later if later != name else f"model.{name}", value)
    writer.close()
    assert "model.image_newline" in TensorFiles.open(folder)
    assert_stock_logits(folder)


@pytest.mark.parametrize(
    ("raw", "place"),
    [
        ("vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias", ("vision", "encoder.layers.0.mlp.fc1.bias")),
        ("model.vision_tower.embeddings.class_embedding", ("vision", "embeddings.class_embedding")),
        ("multi_modal_projector.linear_1.weight", ("projector", "linear_1.weight")),
        ("image_newline", ("projector", NEWLINE)),
        ("language_model.model.norm.weight", ("language", "model.norm.weight")),
        ("model.language_model.norm.weight", ("language", "model.norm.weight")),
        ("language_model.lm_head.weight", ("language", "lm_head.weight")),
        ("lm_head.weight", ("language", "lm_head.weight")),
        ("language_model.model.layers.0.self_attn.rotary_emb.inv_freq", None),
        ("model.layers.0.mlp.up_proj.weight", ("language", "model.layers.0.mlp.up_proj.weight")),
        ("visual.blocks.0.attn.qkv.weight", ("vision", "blocks.0.attn.qkv.weight")),
        ("model.visual.merger.ln_q.weight", ("projector", "merger.ln_q.weight")),
        ("model.visual.deepstack_merger_list.0.norm.bias", ("projector", "deepstack_merger_list.0.norm.bias")),
        ("model.mm_projector.0.weight", None),
    ],
)
def test_every_name_has_its_place(raw: str, place: tuple[str, str] | None) -> None:
    assert place_of(raw) == place


def changed(folder: Path, file: str, **values: Any) -> Path:
    read = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**read, **values}))
    return folder


@pytest.mark.parametrize(
    ("values", "named"),
    [
        (
            {"model_type": "qwen3_vl_moe", "architectures": ["Qwen3VLMoeForImages"]},
            "Qwen3VLMoe.*is not opened.*experts",
        ),
        ({"model_type": "qwen3_5", "architectures": ["Qwen3_5ForImages"]}, "Qwen3_5.*is not opened.*recurrent"),
        ({"model_type": "gemma4", "architectures": ["Gemma4ForImages"]}, "Gemma4.*is not opened.*not causal"),
        ({"model_type": "unheard", "architectures": ["Unheard"]}, "Unheard is not opened.*name three directories"),
        ({"mm_vision_tower": "openai/clip", "architectures": ["LlavaLlamaForCausalLM"]}, "LlavaLlama.*mm_projector"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantized weights cannot be trained.*model.load"),
        ({"vision_feature_layer": [-2, -5]}, "several layers"),
        ({"image_token_index": 5}, "its image token is 5"),
    ],
)
def test_what_does_not_fall_apart_is_refused_by_name(tmp_path: Path, values: dict[str, Any], named: str) -> None:
    folder = changed(make_published(tmp_path / "llava"), "config.json", **values)
    with pytest.raises(InputError, match=named):
        read_metadata(published(folder), 256)


def test_a_processor_that_makes_other_pixels_is_refused(tmp_path: Path) -> None:
    folder = make_published(tmp_path / "llava")
    values = json.loads((folder / "processor_config.json").read_text())
    values["image_processor"] |= {"do_center_crop": False, "do_pad": False}
    (folder / "processor_config.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match="keeps an image's proportions"):
        read_metadata(published(folder), 256)


def test_weights_that_are_missing_are_named(tmp_path: Path) -> None:
    folder = make_published(tmp_path / "llava")
    files = TensorFiles.open(folder)
    tensors = {name: files.read(name) for name in files if "linear_2.bias" not in name}
    writer = ShardedWriter(folder)
    for name, value in tensors.items():
        writer.add(name, value)
    writer.close()
    source = published(folder)
    with pytest.raises(InputError, match=r"no tensor for linear_2\.bias"):
        build_vlm(source, read_metadata(source, 256), frozen_dtype=torch.float32, seed=0)


def test_three_directories_are_what_is_meant_where_no_kind_stands() -> None:
    parts = {"vision": {"kind": "clip", "path": "a"}, "projector": {"kind": "mlp"}}
    language = {"kind": "pretrained", "path": "b"}
    from trainer.config.recipe import Recipe

    stage = {"tune": {"projector": {"kind": "full", "learning_rate": 1}}, "duration": {"unit": "steps", "count": 1}}
    stage |= {"data": {"sources": [{"path": "c"}], "template": {"kind": "plain"}, "max_length": 8}}
    stage |= {"batch": {"global_rows": 1, "micro_rows": 1}}
    values = {"name": "x", "run": "y", "model": {**parts, "language": language}, "stages": {"s": stage}}
    assert isinstance(Recipe.model_validate_json(json.dumps(values)).model, ModelConfig)


def test_bounds_of_an_image_that_leave_none_are_refused_without_the_model() -> None:
    with pytest.raises(ValidationError, match="min_image_tokens=4 is above max_image_tokens=2"):
        PublishedModel(path="Qwen/Qwen3-VL-4B-Instruct", min_image_tokens=4, max_image_tokens=2)
    PublishedModel(path="Qwen/Qwen3-VL-4B-Instruct", min_image_tokens=4, max_image_tokens=4)
