"""Two more backbones of the synthetic world: a ViT trained on labels, and an untrained text encoder.

Owns a ViTModel trained to classify the shape at each place (as ViT-B/16 on ImageNet's classes), and a DistilBERT with
random weights and a WordPiece vocabulary of the captions, for a Q-Former to start from. Both are Hugging Face folders.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.common.files import new_directory
from tools.examples.synthetic.clip import MEAN, STD, ClipSize, image_processor, load_pixels, read_captions
from tools.examples.synthetic.optimise import Schedule, fit
from tools.examples.synthetic.world import COLOURS, PLACES, SHAPES, SIZES

NUM_CHECKED = 256
"""Images at the file's end that are not trained on: accuracy is measured on them."""
WORDS = (SIZES, tuple(COLOURS), SHAPES, PLACES)
NOTHING = -100
POSITION_SCALE = 20.0
"""Factor on the initial position embeddings, as for CLIP (tools.examples.synthetic.clip)."""
_THING = re.compile(rf"a (\w+) (\w+) (\w+) at the ({'|'.join(PLACES)})")


@dataclass(frozen=True)
class EncoderSize:
    """The ViT's shape (its images are CLIP's) and the DistilBERT's."""

    width: int = 96
    num_layers: int = 3
    num_heads: int = 4
    text_width: int = 64
    text_layers: int = 2
    text_heads: int = 4
    text_deviation: float = 0.1
    """About 1 / sqrt(text_width), as the language model's: at BERT's 0.02 attention stays flat for long."""
    vocab_size: int = 256
    max_words: int = 48


def pretrain_vit(world: Path, out: Path, steps: int, batch_size: int, seed: int) -> dict[str, float]:
    """Train on the images of `world` to classify the shape at each place; write the ViT without its classifier.

    Returns the share of places, of images that were not trained on, where all attributes are right.
    """
    import torch

    images, captions = read_captions(world)
    with new_directory(out, replace=False) as folder:
        pixels_NCHW, labels_NPA = load_pixels(images), torch.tensor([labels(several[0]) for several in captions])
        torch.manual_seed(seed)
        model = build_vit(EncoderSize())
        batches = _draw(len(images) - NUM_CHECKED, batch_size, random.Random(f"{seed}:vit"))
        losses = (sum_of_losses(model(pixels_NCHW[chosen_B]), labels_NPA[chosen_B]) for chosen_B in batches)
        train_loss = fit(model, losses, steps, Schedule(2e-3), "vit")
        right = examine(model, pixels_NCHW[-NUM_CHECKED:], labels_NPA[-NUM_CHECKED:])
        reached = {"steps": steps, "train_loss": train_loss, "places_right": right}
        model.vit.save_pretrained(folder)
        image_processor(ClipSize()).save_pretrained(folder)
        (folder / "reached.json").write_text(json.dumps(reached, indent=1) + "\n", encoding="utf-8")
    return reached


def labels(caption: str) -> list[list[int]]:
    """For each place the numbers of its thing's size, colour and shape, and its own; an empty one has shape's last.

    `caption` is the first one of a scene (tools.examples.synthetic.questions.captions), which describes everything.
    """
    found = [[NOTHING, NOTHING, len(SHAPES), number] for number in range(len(PLACES))]
    for thing in _THING.findall(caption):
        found[PLACES.index(thing[-1])] = [words.index(word) for words, word in zip(WORDS, thing, strict=True)]
    return found


def build_vit(size: EncoderSize) -> Any:
    """A fresh ViT with classifiers over its patches, of which each is a place; from PyTorch's current random state."""
    import torch
    from transformers import ViTConfig, ViTModel

    class Classifier(torch.nn.Module):
        """Pixels as bytes -> for size, colour, shape and place the logits [B, places, classes]."""

        def __init__(self) -> None:
            super().__init__()
            image = ClipSize()
            config = ViTConfig(
                image_size=image.image_size,
                patch_size=image.patch_size,
                hidden_size=size.width,
                intermediate_size=3 * size.width,
                num_hidden_layers=size.num_layers,
                num_attention_heads=size.num_heads,
            )
            self.vit = ViTModel(config, add_pooling_layer=False)
            with torch.no_grad():
                self.vit.embeddings.position_embeddings.mul_(POSITION_SCALE)
            counts = [len(words) + (words is SHAPES) for words in WORDS]
            self.heads = torch.nn.ModuleList(torch.nn.Linear(size.width, count) for count in counts)

        def forward(self, pixels_BCHW: Any) -> list[Any]:
            normalised = (pixels_BCHW.float() / 255 - MEAN[0]) / STD[0]
            patches_BPV = self.vit(pixel_values=normalised).last_hidden_state[:, 1:]
            return [head(patches_BPV) for head in self.heads]

    return Classifier()


def _draw(num: int, batch_size: int, rng: random.Random) -> Iterator[Any]:
    import torch

    while True:
        yield torch.tensor(rng.sample(range(num), min(batch_size, num)))


def sum_of_losses(logits: Sequence[Any], labels_BPA: Any) -> Any:
    """The mean cross-entropies of the attributes, added up."""
    import torch

    losses = [
        torch.nn.functional.cross_entropy(each.flatten(0, 1), labels_BPA[..., number].flatten(), ignore_index=NOTHING)
        for number, each in enumerate(logits)
    ]
    return torch.stack(losses).sum()


def examine(model: Any, pixels_NCHW: Any, labels_NPA: Any) -> float:
    """The share of places where all attributes, or emptiness, are predicted right."""
    import torch

    with torch.no_grad():
        chosen_NPA = torch.stack([each.argmax(-1) for each in model(pixels_NCHW)], -1)
    is_right_NPA = (chosen_NPA == labels_NPA) | (labels_NPA == NOTHING)
    return float(is_right_NPA.all(-1).float().mean())


def make_text_encoder(world: Path, out: Path, seed: int) -> None:
    """Write a DistilBERT with random weights and a WordPiece tokenizer of the world's captions."""
    import torch
    from transformers import DistilBertConfig, DistilBertForMaskedLM

    _, captions = read_captions(world)
    size = EncoderSize()
    with new_directory(out, replace=False) as folder:
        tokenizer = train_wordpiece([caption for several in captions for caption in several], size)
        torch.manual_seed(seed)
        config = DistilBertConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=size.max_words,
            dim=size.text_width,
            hidden_dim=3 * size.text_width,
            n_layers=size.text_layers,
            n_heads=size.text_heads,
            initializer_range=size.text_deviation,
            pad_token_id=tokenizer.pad_token_id,
        )
        DistilBertForMaskedLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def train_wordpiece(texts: Sequence[str], size: EncoderSize) -> Any:
    """Train an uncased WordPiece tokenizer on `texts`, framed as BERT's: [CLS] text [SEP]."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import PreTrainedTokenizerFast

    pieces = BertWordPieceTokenizer(lowercase=True)
    pieces.train_from_iterator(texts, vocab_size=size.vocab_size, show_progress=False)
    pieces.post_processor = _bert_frame(pieces)
    return PreTrainedTokenizerFast(
        tokenizer_object=pieces._tokenizer,
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        unk_token="[UNK]",
        mask_token="[MASK]",
        model_max_length=size.max_words,
    )


def _bert_frame(pieces: Any) -> Any:
    from tokenizers.processors import BertProcessing

    ends = [(name, pieces.token_to_id(name)) for name in ("[SEP]", "[CLS]")]
    return BertProcessing(*ends)
