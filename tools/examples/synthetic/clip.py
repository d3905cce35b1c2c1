"""A tiny CLIP, trained from scratch by contrast on images and captions: the synthetic world's, or your own photos.

Owns its tokenizer, its shape, its training and its folder on disk (transformers' CLIPModel with an image processor, so
that any loader of CLIP vision towers opens it). Does not own reading and augmenting photos (photos.py) or the language
model.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from models.common.errors import InputError
from models.common.files import new_directory, read_lines
from tools.examples.synthetic.optimise import Schedule, fit
from tools.examples.synthetic.world import SIDE

START, END, PAD = "<|startoftext|>", "<|endoftext|>", "<|pad|>"
MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
POSITION_SCALE = 20.0
"""Factor on the initial position embeddings: at CLIP's own 0.02 a patch's colour dominates its position."""
NUM_CHECKED = 256
"""Images at the file's end that are not trained on: retrieval is measured on them."""


@dataclass(frozen=True)
class Tower:
    """A transformer's shape; its feed-forward is three times as wide."""

    width: int
    num_layers: int
    num_heads: int


@dataclass(frozen=True)
class ClipSize:
    """The two towers' shapes, and the size of their tokenizer's vocabulary."""

    image_size: int = SIDE
    patch_size: int = 24
    vision: Tower = Tower(width=96, num_layers=3, num_heads=4)
    text: Tower = Tower(width=64, num_layers=2, num_heads=4)
    max_words: int = 48
    vocab_size: int = 512
    joint_width: int = 64


class Captioned(NamedTuple):
    """Images as bytes (N, 3, S, S), the captions of each (equally many), the towers for them, and how images are
    varied as they are drawn."""

    pixels_NCHW: Any
    captions: Sequence[Sequence[str]]
    size: ClipSize
    vary: Callable[[Any, random.Random], Any] | None = None


class Pairs(NamedTuple):
    """Images as bytes (N, 3, S, S) and, for each, its captions' ids, padded (N, captions, words)."""

    pixels_NCHW: Any
    ids_NKW: Any


def pretrain_clip(read: Callable[[], Captioned], out: Path, steps: int, batch_size: int, seed: int) -> dict[str, float]:
    """Train on the images and captions that `read` gives; write a Hugging Face folder with reached.json in it.

    Returns the retrieval scores: how often the right caption is the nearest among 256, and the reverse, on images that
    were not trained on (the last 256).
    """
    import torch

    with new_directory(out, replace=False) as folder:
        pixels_NCHW, captions, size, vary = read()
        tokenizer = train_tokenizer([caption for several in captions for caption in several], size)
        pairs = Pairs(pixels_NCHW, encode_captions(tokenizer, captions))
        torch.manual_seed(seed)
        model = build_clip(size, tokenizer)
        learnt = Pairs(pairs.pixels_NCHW[:-NUM_CHECKED], pairs.ids_NKW[:-NUM_CHECKED])
        batches = draw_pairs(learnt, batch_size, random.Random(f"{seed}:clip"), vary)
        train_loss = fit(model, (contrast(model, *batch) for batch in batches), steps, Schedule(2e-3), "clip")
        unseen = (pairs.pixels_NCHW[-NUM_CHECKED:], pairs.ids_NKW[-NUM_CHECKED:, 0])
        reached = {"steps": steps, "train_loss": train_loss, **retrieval(model, *unseen)}
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        image_processor(size).save_pretrained(folder)
        (folder / "reached.json").write_text(json.dumps(reached, indent=1) + "\n", encoding="utf-8")
    return reached


def read_world(world: Path) -> Captioned:
    """The images of a world, and the captions of each."""
    images, captions = read_captions(world)
    return Captioned(load_pixels(images), captions, ClipSize())


def read_captions(world: Path) -> tuple[list[Path], list[list[str]]]:
    """The images of a world, and the captions of each."""
    path = world / "captions.jsonl"
    if not path.is_file():
        raise InputError(f"no {path}: make a world first (python -m tools.toy world OUT)")
    entries = read_lines(path)
    if len(entries) <= NUM_CHECKED:
        raise InputError(f"{path} holds {len(entries)} images, not over {NUM_CHECKED}: draw more scenes")
    return [world / "images" / entry["image"] for entry in entries], [entry["captions"] for entry in entries]


def load_pixels(images: Sequence[Path]) -> Any:
    """All images as bytes, (N, 3, S, S), which have one size: 12,000 of 48 pixels take 150 MB."""
    import numpy as np
    import torch
    from PIL import Image

    with Image.open(images[0]) as first:
        pixels_NHWC = np.empty((len(images), first.height, first.width, 3), dtype=np.uint8)
    for index, path in enumerate(images):
        with Image.open(path) as image:
            pixels_NHWC[index] = np.asarray(image.convert("RGB"))
    return torch.from_numpy(pixels_NHWC).permute(0, 3, 1, 2).contiguous()


def train_tokenizer(captions: Sequence[str], size: ClipSize) -> Any:
    """A byte-level BPE over the captions, with CLIP's own two markers around each text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = [START, END, PAD]
    bpe.train_from_iterator(
        captions,
        trainers.BpeTrainer(
            vocab_size=size.vocab_size, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
        ),
    )
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(START, bpe.token_to_id(START)), (END, bpe.token_to_id(END))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=START,
        eos_token=END,
        pad_token=PAD,
        model_max_length=size.max_words,
    )


def encode_captions(tokenizer: Any, captions: Sequence[Sequence[str]]) -> Any:
    """Ids of every caption, (N, captions, words), padded on the right to the longest."""
    flat = [caption for several in captions for caption in several]
    ids_MW = tokenizer(flat, padding=True, truncation=False, return_tensors="pt").input_ids
    if ids_MW.shape[1] > tokenizer.model_max_length:
        longest = max(flat, key=lambda caption: len(tokenizer(caption).input_ids))
        raise InputError(
            f"a caption has {ids_MW.shape[1]} tokens, and the limit is {tokenizer.model_max_length}: "
            f"shorten {longest[:40]!r} ..."
        )
    return ids_MW.reshape(len(captions), -1, ids_MW.shape[1])


def build_clip(size: ClipSize, tokenizer: Any) -> Any:
    """A fresh CLIP from PyTorch's current random state."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    vision = {
        "image_size": size.image_size,
        "patch_size": size.patch_size,
        "hidden_size": size.vision.width,
        "intermediate_size": 3 * size.vision.width,
        "num_hidden_layers": size.vision.num_layers,
        "num_attention_heads": size.vision.num_heads,
        "projection_dim": size.joint_width,
    }
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": size.text.width,
        "intermediate_size": 3 * size.text.width,
        "num_hidden_layers": size.text.num_layers,
        "num_attention_heads": size.text.num_heads,
        "max_position_embeddings": size.max_words,
        "projection_dim": size.joint_width,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=size.joint_width))
    with torch.no_grad():
        model.vision_model.embeddings.position_embedding.weight.mul_(POSITION_SCALE)
    return model


def draw_pairs(
    pairs: Pairs, batch_size: int, rng: random.Random, vary: Callable[[Any, random.Random], Any] | None = None
) -> Iterator[tuple[Any, Any]]:
    """Batches without end: (pixels_BCHW, ids_BW), a random caption of each image."""
    import torch

    num_pairs, num_captions, _ = pairs.ids_NKW.shape
    if num_pairs < batch_size:
        raise InputError(f"a batch of {batch_size} needs as many images, and there are {num_pairs}")
    while True:
        order = torch.tensor(rng.sample(range(num_pairs), num_pairs))
        for start in range(0, num_pairs - batch_size + 1, batch_size):
            chosen_B = order[start : start + batch_size]
            which_B = torch.tensor(rng.choices(range(num_captions), k=batch_size))
            pixels_BCHW = pairs.pixels_NCHW[chosen_B]
            yield vary(pixels_BCHW, rng) if vary else pixels_BCHW, pairs.ids_NKW[chosen_B, which_B]


def similarities(model: Any, pixels_BCHW: Any, ids_BW: Any) -> Any:
    """Cosine similarities of texts and images times the trained scale, (texts, images)."""
    normalised_BCHW = (pixels_BCHW.float() / 255 - MEAN[0]) / STD[0]
    longest = int((ids_BW != model.config.text_config.pad_token_id).sum(1).max())
    return model(input_ids=ids_BW[:, :longest], pixel_values=normalised_BCHW).logits_per_text


def contrast(model: Any, pixels_BCHW: Any, ids_BW: Any) -> Any:
    """CLIP's symmetric cross-entropy (Radford et al. 2021, figure 3)."""
    import torch

    scores_BB = similarities(model, pixels_BCHW, ids_BW)
    target_B = torch.arange(len(scores_BB))
    loss = torch.nn.functional.cross_entropy
    return (loss(scores_BB, target_B) + loss(scores_BB.T, target_B)) / 2


def retrieval(model: Any, pixels_NCHW: Any, ids_NW: Any) -> dict[str, float]:
    """Recall at 1 in both directions; ties do not occur in practice."""
    import torch

    with torch.no_grad():
        scores_NN = similarities(model, pixels_NCHW, ids_NW)
    target_N = torch.arange(len(scores_NN))
    image = float((scores_NN.argmax(1) == target_N).float().mean())
    text = float((scores_NN.argmax(0) == target_N).float().mean())
    return {"text_to_picture": image, "picture_to_text": text}


def image_processor(size: ClipSize) -> Any:
    """CLIP's processor for these images: shorter side to the tower's size, central square, MEAN and STD."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return CLIPImageProcessorPil(
        size={"shortest_edge": size.image_size},
        crop_size={"height": size.image_size, "width": size.image_size},
        image_mean=list(MEAN),
        image_std=list(STD),
    )
