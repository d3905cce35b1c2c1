"""A page of samples as the model gets them: the fitted picture, every token, and which of them are learnt.

Owns the HTML. What it shows comes from the training pipeline's own encoder, so a wrong mask or a cut-off picture shows
here before it costs a run. The page is one file; nothing in it is loaded from elsewhere, and all text is escaped.
"""

from __future__ import annotations

import base64
import html
import io
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydantic import TypeAdapter

from data_pipeline.config import TemplateConfig
from data_pipeline.encode import Encoder, PictureSizes
from data_pipeline.index import ShardIndex
from data_pipeline.mixture import Concatenation
from data_pipeline.record import read_record
from data_pipeline.sample import TileArray, TokenArray
from data_pipeline.templates import build_template
from data_pipeline.tokens import Tokens
from models.errors import InputError
from models.spec import (
    IGNORE_INDEX,
    IMAGE_TOKEN,
    AnyResImage,
    CropImage,
    ImageFit,
    ImageSpec,
    PadImage,
    canvas_size,
)

_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

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


def load_encoder(
    index: ShardIndex, *, tokenizer: str, template: str, fit: str, size: int, patch_size: int
) -> tuple[Encoder, Any]:
    """The training pipeline's encoder for one set, and the tokenizer that names its ids.

    Raises:
        InputError: no such tokenizer, or one without the template's tokens.
    """
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(tokenizer)
    except (OSError, ValueError) as error:
        raise InputError(f"no tokenizer at {tokenizer}: {str(error).splitlines()[0]}") from None
    if IMAGE_TOKEN not in loaded.get_vocab():
        loaded.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    tokens = Tokens.of(loaded)
    encoder = Encoder(
        [index],
        Concatenation([index.shard_sizes], 0, 1, 1),
        template=build_template(TypeAdapter(TemplateConfig).validate_python({"kind": template}), tokens),
        tokens=tokens,
        image=ImageSpec(size=size, patch_size=patch_size, fit=_rule(fit, size), mean=_CLIP_MEAN, std=_CLIP_STD),
        max_length=2**30,
    )
    return encoder, loaded


def _rule(fit: str, size: int) -> ImageFit:
    if fit == "anyres":
        return AnyResImage(pinpoints=tuple((down * size, across * size) for down, across in _SQUARES))
    return PadImage() if fit == "pad" else CropImage()


def write_page(index: ShardIndex, encoder: Encoder, tokenizer: Any, count: int, out: Path) -> int:
    """Write the page beside its name, then rename it; returns the number of samples on it."""
    if count < 1:
        raise InputError(f"--count {count}: at least 1")
    if not out.parent.is_dir():
        raise InputError(f"no directory {out.parent} to write {out.name} into")
    places = sorted(set(np.linspace(0, len(index) - 1, min(count, len(index))).astype(int).tolist()))
    articles = [_article(index, encoder, tokenizer, place) for place in places]
    title = html.escape(f"{index.folder}: {len(places)} of {len(index)} samples")
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        f'<h1>{title}</h1><p><span class="learnt">Learnt</span>: the loss is on these tokens. The rest is context.</p>'
        f"{''.join(articles)}</html>\n"
    )
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    temporary.write_text(page, encoding="utf-8")
    temporary.rename(out)
    return len(places)


def _article(index: ShardIndex, encoder: Encoder, tokenizer: Any, place: int) -> str:
    name = f"{html.escape(index.key_of(place))} <small>{html.escape(index.shard_of(place))}</small>"
    try:
        record = read_record(index.read(place))
        ids, labels, tiles, sizes, _ = encoder.encode_record(record)
    except InputError as error:
        return f'<article><div></div><div><h2>{name}</h2><p class="bad">{html.escape(str(error))}</p></div></article>'
    num_image = int(np.count_nonzero(ids == encoder.tokens.image_token_id))
    num_learnt = int(np.count_nonzero(labels != IGNORE_INDEX))
    facts = f"{len(ids)} tokens, {num_image} of them image, {num_learnt} learnt; {len(tiles)} tiles"
    body = "".join(_token_spans(ids, labels, tokenizer, encoder.tokens.image_token_id))
    return (
        f"<article><div>{''.join(_pictures(tiles, sizes, encoder.image))}</div>"
        f'<div><h2>{name}</h2><p>{facts}</p><div class="tokens">{body}</div></div></article>'
    )


def _pictures(tiles: TileArray, sizes: PictureSizes, spec: ImageSpec) -> Iterator[str]:
    """Each picture's square and, under AnyRes, its tiles as they lie on the canvas."""
    images = _tile_images(tiles)
    for height, width in sizes:
        yield next(images)
        if isinstance(spec.fit, AnyResImage):
            down, across = (side // spec.size for side in canvas_size(spec, width, height))
            grid = "".join(itertools.islice(images, down * across))
            yield f'<div class="tiles" style="grid-template-columns: repeat({across}, 1fr)">{grid}</div>'


def _tile_images(tiles: TileArray) -> Iterator[str]:
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
