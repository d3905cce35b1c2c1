"""A tiny random ViT and DistilBERT in Hugging Face format, and a recipe of a Q-Former over them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.support.backbones import IMAGE_SIZE, PATCH_SIZE, SENTENCES, tiny_recipe

NUM_QUERIES = 4
WORDS = [*SENTENCES, "caption word 0 1 2 3 4 5 6 7 8 9 noise number"]


def make_vit(folder: Path, *, seed: int = 0) -> Path:
    """A random ViTModel with its image processor."""
    from transformers import ViTConfig, ViTModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    torch.manual_seed(seed)
    shape = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = ViTConfig(image_size=IMAGE_SIZE, patch_size=PATCH_SIZE, initializer_range=0.2, **shape)
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=size).save_pretrained(folder)
    return folder


def make_text_encoder(folder: Path, *, seed: int = 0) -> Path:
    """A random DistilBERT of two layers with a WordPiece vocabulary."""
    from transformers import DistilBertConfig, DistilBertForMaskedLM

    tokenizer = make_wordpiece(WORDS)
    torch.manual_seed(seed)
    config = DistilBertConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=64,
        dim=32,
        hidden_dim=64,
        n_layers=2,
        n_heads=4,
        initializer_range=0.2,
        pad_token_id=tokenizer.pad_token_id,
    )
    DistilBertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_wordpiece(texts: list[str]) -> Any:
    """An uncased BERT tokenizer that has read these texts: [CLS] text [SEP]."""
    from tokenizers import BertWordPieceTokenizer
    from tokenizers.processors import BertProcessing
    from transformers import PreTrainedTokenizerFast

    pieces = BertWordPieceTokenizer(lowercase=True)
    pieces.train_from_iterator(texts, vocab_size=160, show_progress=False)
    pieces.post_processor = BertProcessing(*(((name, pieces.token_to_id(name))) for name in ("[SEP]", "[CLS]")))
    return PreTrainedTokenizerFast(
        tokenizer_object=pieces._tokenizer,
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        unk_token="[UNK]",
        mask_token="[MASK]",
        model_max_length=64,
    )


def qformer_recipe(folder: Path, shards: Path, losses: tuple[str, ...] = ("itc", "itm", "itg")) -> dict[str, Any]:
    """contrast, align, lora over tiny parts, in tens of milliseconds a step."""
    recipe = tiny_recipe(folder, shards)
    if not (folder / "vit").is_dir():
        make_vit(folder / "vit")
        make_text_encoder(folder / "text")
    recipe["model"]["vision"] = {"kind": "vit", "path": str(folder / "vit"), "feature_layer": -1, "keep_cls": True}
    recipe["model"]["projector"] = {
        "kind": "qformer",
        "path": str(folder / "text"),
        "num_queries": NUM_QUERIES,
        "joint_width": 16,
    }
    align, lora = recipe["stages"]["align"], recipe["stages"]["lora"]
    align["init"] = "contrast"
    for stage in (align, lora):
        stage["tune"]["projector"]["frozen"] = ["text"]
    contrast = {
        **align,
        "init": None,
        "objective": {"kind": "image_text", "losses": list(losses)},
        "data": {**align["data"], "template": {"kind": "pair"}, "max_length": 64},
        "batch": {"global_rows": 4, "micro_rows": 4},
        "tune": {
            "projector": {
                "kind": "full",
                "learning_rate": 1e-3,
                "learning_rates": {"queries": 3e-3, "cross_attention": 3e-3},
                "frozen": ["adapter"],
            }
        },
    }
    recipe["stages"] = {"contrast": contrast, "align": align, "lora": lora}
    return recipe
