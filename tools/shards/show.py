"""A page of samples as the model gets them: the resized image, the text, and which of it is trained on.

    with a tokenizer      every token with its mask, by the training pipeline's own encoder
    without one           the turns as in the shards; assistant turns are trained on

Owns the HTML. A wrong mask or a cut-off image shows here before it costs a run. The page is one file; nothing in it is
loaded from elsewhere, and all text is escaped.
"""

from __future__ import annotations

import base64
import html
import io
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydantic import TypeAdapter

from data_pipeline.config import TemplateConfig
from data_pipeline.encode import Encoder, ImageSizes
from data_pipeline.images import open_image
from data_pipeline.index import ShardIndex
from data_pipeline.record import Record, Turn, read_record
from data_pipeline.sample import TileArray, TokenArray
from data_pipeline.templates import build_template
from data_pipeline.tiles import fit_tiles, joined_patches
from data_pipeline.tokens import Tokens
from models.common.errors import InputError
from models.common.files import write_text
from models.spec import (
    CLIP_MEAN,
    CLIP_STD,
    IGNORE_INDEX,
    IMAGE_TOKEN,
    AnyResImage,
    CropImage,
    ImageFit,
    ImageSpec,
    PadImage,
    canvas_size,
)

_SQUARES = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
"""LLaVA-NeXT's canvases, in squares: (down, across)."""

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
article { display: grid; grid-template-columns: 14rem 1fr; gap: 1rem; border-top: 1px solid #ccc; padding: 1rem 0; }
img { width: 100%; image-rendering: auto; margin-bottom: .3rem; }
h2 { font-size: 1rem; margin: 0 0 .3rem; } h2 small { font-weight: normal; color: #666; }
.tiles { display: grid; gap: 2px; margin-bottom: .6rem; } .tiles img { margin: 0; }
.tokens { white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.7 ui-monospace, monospace; }
.tokens span { border-radius: 2px; box-shadow: inset 0 0 0 1px #0001; }
.learnt { background: #bde5c0; } .image { background: #cfdcf7; padding: 0 .3em; } .bad { color: #a40000; }
"""


@dataclass(frozen=True)
class Shown:
    """One sample as HTML: its images, a line of figures, and its text."""

    images: str
    figures: str
    text: str


Render = Callable[[Record], Shown]
"""Shows one sample; raises InputError where training could not use it."""


def render_text(image: ImageSpec) -> Render:
    """The turns as text, each image tag marked, without a template or a tokenizer."""

    def render(record: Record) -> Shown:
        opened = [open_image(payload) for payload in record.images]
        nothing = np.empty((0, image.size, image.size, 3), dtype=np.uint8)
        tiles = np.concatenate([nothing, *(fit_tiles(each, image) for each in opened)])
        sizes = tuple((each.height, each.width) for each in opened)
        num_words = sum(len(turn.text.split()) for turn in record.turns)
        figures = f"{len(record.turns)} turns of {num_words} words; {len(opened)} images; {len(tiles)} tiles"
        return Shown("".join(_images(tiles, sizes, image)), figures, "".join(map(_turn_text, record.turns)))

    return render


def _turn_text(turn: Turn) -> str:
    shown = html.escape(turn.text).replace("\n", "\\n\n")
    tag = html.escape(IMAGE_TOKEN)
    shown = shown.replace(tag, f'<span class="image">{tag}</span>')
    kind = ' class="learnt"' if turn.role == "assistant" else ""
    return f"<b>{turn.role}</b> <span{kind}>{shown}</span>\n"


def render_tokens(encoder: Encoder, tokenizer: Any) -> Render:
    """Every token as the training pipeline's encoder makes it, named by the tokenizer."""

    def render(record: Record) -> Shown:
        ids, labels, tiles, sizes, *_ = encoder.encode_record(record)
        num_image = int(np.count_nonzero(ids == encoder.tokens.image_token_id))
        num_learnt = int(np.count_nonzero(labels != IGNORE_INDEX))
        figures = f"{len(ids)} tokens, {num_image} of them image, {num_learnt} learnt; {len(tiles)} tiles"
        text = "".join(_token_spans(ids, labels, tokenizer, encoder.tokens.image_token_id))
        return Shown("".join(_images(tiles, sizes, encoder.image)), figures, text)

    return render


def load_encoder(index: ShardIndex, *, tokenizer: str, template: str, image: ImageSpec) -> tuple[Encoder, Any]:
    """The training pipeline's encoder for one set, and the tokenizer that names its ids.

    Args:
        tokenizer: a directory or a hub name.
        template: the `kind` of a recipe's chat template.

    Raises:
        InputError: no such tokenizer, or one without the template's tokens.
    """
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(f"no tokenizer at {tokenizer}: {str(error).splitlines()[0]}") from None
    if IMAGE_TOKEN not in loaded.get_vocab():
        loaded.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    tokens = Tokens.of(loaded)
    encoder = Encoder(
        [index],
        template=build_template(TypeAdapter(TemplateConfig).validate_python({"kind": template}), tokens),
        tokens=tokens,
        image=image,
        max_length=2**30,
    )
    return encoder, loaded


def image_spec(fit: str, size: int, patch_size: int) -> ImageSpec:
    """How an image becomes squares of `size` pixels: by `crop`, `pad` or `anyres`, with CLIP's mean and deviation."""
    return ImageSpec(size=size, patch_size=patch_size, fit=_rule(fit, size), mean=CLIP_MEAN, std=CLIP_STD)


def _rule(fit: str, size: int) -> ImageFit:
    if fit == "anyres":
        return AnyResImage(pinpoints=tuple((down * size, across * size) for down, across in _SQUARES))
    return PadImage() if fit == "pad" else CropImage()


def write_page(index: ShardIndex, render: Render, count: int, out: Path) -> int:
    """Write the page atomically; returns the number of samples on it."""
    if count < 1:
        raise InputError(f"--count {count}: at least 1")
    if not out.parent.is_dir():
        raise InputError(f"no directory {out.parent} to write {out.name} into")
    places = sorted(set(np.linspace(0, len(index) - 1, min(count, len(index))).astype(int).tolist()))
    articles = [_article(index, render, place) for place in places]
    title = html.escape(f"{index.folder}: {len(places)} of {len(index)} samples")
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        f'<h1>{title}</h1><p><span class="learnt">Learnt</span>: the loss is on this text. The rest is context.</p>'
        f"{''.join(articles)}</html>\n"
    )
    write_text(out, page)
    return len(places)


def _article(index: ShardIndex, render: Render, place: int) -> str:
    name = f"{html.escape(index.key_of(place))} <small>{html.escape(index.shard_of(place))}</small>"
    try:
        shown = render(read_record(index.read(place)))
    except InputError as error:
        return f'<article><div></div><div><h2>{name}</h2><p class="bad">{html.escape(str(error))}</p></div></article>'
    return (
        f"<article><div>{shown.images}</div><div><h2>{name}</h2><p>{shown.figures}</p>"
        f'<div class="tokens">{shown.text}</div></div></article>'
    )


def _images(tiles: TileArray, sizes: ImageSizes, spec: ImageSpec) -> Iterator[str]:
    """Each image's square and, under AnyRes, its tiles as they lie on the canvas; of patches the image."""
    if spec.fit.grid is not None:
        yield from _tile_images(joined_patches(tiles, sizes, spec.fit.grid))
        return
    images = _tile_images(tiles)
    for height, width in sizes:
        yield next(images)
        if spec.fit.is_tiled:
            down, across = (side // spec.size for side in canvas_size(spec, width, height))
            grid = "".join(itertools.islice(images, down * across))
            yield f'<div class="tiles" style="grid-template-columns: repeat({across}, 1fr)">{grid}</div>'


def _tile_images(tiles: Iterable[TileArray]) -> Iterator[str]:
    for number, tile in enumerate(tiles):
        stream = io.BytesIO()
        Image.fromarray(tile).save(stream, "PNG")
        content = base64.b64encode(stream.getvalue()).decode()
        yield f'<img alt="tile {number}" src="data:image/png;base64,{content}">'


def _token_spans(ids: TokenArray, labels: TokenArray, tokenizer: Any, image_token_id: int) -> Iterator[str]:
    """One span a token, a run of image tokens as one; bytes of a character that tokens share are shown as ids."""
    pairs = zip(ids.tolist(), labels.tolist(), strict=True)
    for is_image, run in itertools.groupby(pairs, key=lambda pair: pair[0] == image_token_id):
        if is_image:
            yield f'<span class="image">{html.escape(IMAGE_TOKEN)} x {sum(1 for _ in run)}</span>'
            continue
        for token, label in run:
            text = _token_text(tokenizer, token)
            shown = html.escape(text if "\ufffd" not in text else f"[{token}]").replace("\n", "\\n\n")
            marked = ' class="learnt"' if label != IGNORE_INDEX else ""
            yield f'<span title="{token}"{marked}>{shown}</span>'


def _token_text(tokenizer: Any, token: int) -> str:
    """A token's text; SentencePiece's decoder drops the space a token begins with where it stands alone."""
    text = str(tokenizer.decode([token]))
    begins_word = str(tokenizer.convert_ids_to_tokens(token)).startswith("\u2581")
    return f" {text}" if begins_word and not text.startswith(" ") else text
