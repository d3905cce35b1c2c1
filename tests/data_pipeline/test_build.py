"""A configuration becomes a stream, or one line that says what does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data_pipeline.augment import Augmenter
from data_pipeline.build import build_order, open_stream, order_fingerprint
from data_pipeline.config import DataConfig, ImageAugment, PlainTemplate, RowPacking, SourceConfig
from data_pipeline.encode import Encoder
from data_pipeline.index import ShardIndex
from models.common.errors import InputError
from models.spec import AnyResImage
from tests.support.shards import IMAGE, text_spec, write_set
from tests.support.streams import TOKENIZER, config, open_rank

ANYRES = IMAGE.model_copy(update={"fit": AnyResImage(pinpoints=((16, 32), (32, 16)))})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sets") / "set"
    write_set(path, [7, 1, 13])
    return path


def fingerprint(data: DataConfig) -> str:
    return order_fingerprint(data, [ShardIndex.open(source.path) for source in data.sources])


def test_lengths_and_weights_that_do_not_fit(folder: Path) -> None:
    with pytest.raises(InputError, match="language model takes 512"):
        open_rank(config(folder, max_length=600))
    with pytest.raises(InputError, match="row_tokens"):
        open_rank(config(folder, packing=RowPacking(row_tokens=100)))
    sources = (SourceConfig(path=str(folder), weight=3), SourceConfig(path=str(folder)))
    with pytest.raises(InputError, match="weight"):
        open_rank(config(folder).model_copy(update={"sources": sources}))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"too_long": "fewer_tiles"}, "image fit crop has no canvas"),
        ({"jpeg": "scaled", "image": ANYRES}, "set jpeg: exact"),
    ],
)
def test_choices_about_images_that_exclude_each_other(folder: Path, changes: dict[str, Any], reason: str) -> None:
    changes = dict(changes)
    image = changes.pop("image", IMAGE)
    with pytest.raises(InputError, match=reason):
        open_rank(config(folder, **changes), image=image)


def test_tokenizer_and_model_must_agree_about_the_image_token(folder: Path) -> None:
    text = text_spec(TOKENIZER).model_copy(update={"image_token_id": 3})
    with pytest.raises(InputError, match="in the tokenizer, 3 in the model"):
        open_stream(
            config(folder),
            tokenizer=TOKENIZER,
            image=IMAGE,
            text=text,
            seed=0,
            num_slots=1,
            slots=range(1),
            epochs=1,
            quarantine=None,
        )


def test_an_empty_source_is_named(tmp_path: Path) -> None:
    index = write_set(tmp_path / "set", [2])
    index.shard_sizes[:], index._shard_ends[:] = [0], [0]
    with pytest.raises(InputError, match="holds no samples"):
        build_order(config(tmp_path / "set"), [index], 0, 1)


def test_the_fingerprint_follows_what_the_order_depends_on_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    write_set(tmp_path / "other", [3])
    plain = config(folder)
    assert fingerprint(plain) == fingerprint(config(folder))
    same = (
        plain.model_copy(update={"num_workers": 3, "template": PlainTemplate(), "max_length": 64}),
        config(folder, packing=RowPacking(row_tokens=400), augment=ImageAugment(flip=0.5)),
    )
    assert {fingerprint(each) for each in same} == {fingerprint(plain)}
    others = (
        config(folder, shuffle_window=5),
        config(folder, tmp_path / "other"),
        config(tmp_path / "other", folder),
        config(SourceConfig(path=str(folder), weight=1)),
        config(f"{folder}/shard-{{000000..000001}}.tar"),  # type: ignore[arg-type]
    )
    assert len({fingerprint(plain), *(_opened_fingerprint(each) for each in others)}) == 6


def _opened_fingerprint(data: DataConfig) -> str:
    return open_rank(data, num_slots=1).order.identity.fingerprint


def test_options_reach_the_encoder(folder: Path) -> None:
    stream = open_rank(config(folder, augment=ImageAugment(flip=0.5), jpeg="scaled"))
    encoder = stream._fetcher._encode
    assert isinstance(encoder, Encoder)
    assert isinstance(encoder.handling.augmenter, Augmenter)
    assert encoder.handling.scaled_jpeg
    assert not encoder.handling.shrinks
    stream.close()


def test_opening_starts_no_process_and_writes_no_file(folder: Path, tmp_path: Path) -> None:
    stream = open_rank(config(folder, num_workers=2), quarantine=tmp_path / "quarantine.jsonl")
    assert stream._fetcher._pool is None
    assert list(tmp_path.iterdir()) == []
    stream.close()
