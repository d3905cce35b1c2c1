"""Tiny shard sets, made in milliseconds."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import webdataset as wds
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data_pipeline.index import ShardIndex
from data_pipeline.index_build import build_index
from models.spec import IMAGE_TOKEN, CropImage, ImageSpec, TextSpec

IMAGE = ImageSpec(size=16, patch_size=8, fit=CropImage(), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
"""Four tokens an image."""


def image_bytes(seed: int = 0, size: tuple[int, int] = (20, 16), file_format: str = "PNG") -> bytes:
    """An image of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, file_format)
    return stream.getvalue()


def caption_sample(number: int, *, words: int = 2, image: bool = True) -> dict[str, bytes]:
    """One captioned image, as img2dataset writes it."""
    files = {"txt": f"caption {number} {'word ' * words}".encode()}
    return files | ({"png": image_bytes(number)} if image else {})


def chat_sample(number: int, turns: int = 1) -> dict[str, bytes]:
    """One conversation about an image, in LLaVA's format."""
    conversation = []
    for turn in range(turns):
        tag = f"{IMAGE_TOKEN}\n" if turn == 0 else ""
        conversation.append({"from": "human", "value": f"{tag}What is in picture {number}, part {turn}?"})
        conversation.append({"from": "gpt", "value": f"Noise number {number}."})
    return {"png": image_bytes(number), "json": json.dumps({"conversations": conversation}).encode()}


def write_tar(path: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> Path:
    """A WebDataset tar of (key, {extension: bytes})."""
    with path.open("wb") as stream, wds.TarWriter(stream, encoder=False, mtime=0) as writer:
        for key, files in samples:
            writer.write({"__key__": key, **files})
    return path


def write_set(folder: Path, shard_sizes: Sequence[int], *, image: bool = True, words: int = 2) -> ShardIndex:
    """An indexed set of captioned images with keys 000000, 000001, …, so many in each shard."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    for shard, size in enumerate(shard_sizes):
        samples = [(f"{n:06d}", caption_sample(n, words=words, image=image)) for n in range(number, number + size)]
        write_tar(folder / f"shard-{shard:06d}.tar", samples)
        number += size
    build_index(folder)
    return ShardIndex.open(folder)


def write_mixed_set(folder: Path) -> Path:
    """An indexed set of 12 captions of which two have an image: of four rows, one rank of two may have none at all."""
    folder.mkdir(parents=True)
    samples = [(f"{number:06d}", caption_sample(number, image=number in {3, 8})) for number in range(12)]
    write_tar(folder / "shard-000000.tar", samples)
    build_index(folder)
    return folder


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, ChatML's frame, `<image>` last."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: place for place, character in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", clean_up_tokenization_spaces=False
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", IMAGE_TOKEN]})
    return tokenizer


def text_spec(tokenizer: PreTrainedTokenizerFast, max_length: int = 512) -> TextSpec:
    """The facts of a language model that goes with a tokenizer."""
    return TextSpec(
        max_length=max_length,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        pad_token_id=tokenizer.pad_token_id,
        vocab_size=len(tokenizer),
    )
