"""The data sets of `tools.shards fetch`: addresses, sizes and checksums of their files.

Owns only the table. Sizes and checksums of COCO are those of `tensorflow_datasets` (url_checksums/coco.txt); None
means that no published figure is known: the file is then checked by the server's size and by reading it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_COCO = "http://images.cocodataset.org"
_LLAVA = "https://huggingface.co/datasets/liuhaotian"
_TEXTVQA = "https://dl.fbaipublicfiles.com/textvqa"
_VIZWIZ = "https://vizwiz.cs.colorado.edu/VizWiz_final"
_CONCEPTUAL = "https://storage.googleapis.com/gcc-data"


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file to be fetched. Zips are unpacked into `folder` and removed; other files are kept there."""

    url: str
    num_bytes: int | None = None
    sha256: str | None = None
    folder: str = "."
    columns: tuple[str, ...] = ()
    """Column names of a tab-separated table without a heading."""

    @property
    def name(self) -> str:
        """The file's name: the last part of its address."""
        return self.url.rsplit("/", 1)[-1]


@dataclass(frozen=True, slots=True)
class Source:
    """A data set: its files, and the command that makes shards of them (`OUT` stands for the directory)."""

    title: str
    files: tuple[SourceFile, ...]
    then: str
    image_table: str | None = None
    """A table of image addresses, for img2dataset."""


SOURCES: Mapping[str, Source] = {
    "coco2017": Source(
        "COCO 2017: train and val images, captions (20.4 GB)",
        (
            SourceFile(
                f"{_COCO}/annotations/annotations_trainval2017.zip",
                252_907_541,
                "113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268",
            ),
            SourceFile(
                f"{_COCO}/zips/val2017.zip",
                815_585_330,
                "4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05",
            ),
            SourceFile(
                f"{_COCO}/zips/train2017.zip",
                19_336_861_798,
                "69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929",
            ),
        ),
        "make SET --coco OUT/annotations/captions_train2017.json --images OUT/train2017",
    ),
    "llava-instruct": Source(
        "LLaVA-Instruct-150K: conversations about COCO's train2017",
        (SourceFile(f"{_LLAVA}/LLaVA-Instruct-150K/resolve/main/llava_instruct_150k.json"),),
        "make SET --llava OUT/llava_instruct_150k.json --images COCO/train2017",
    ),
    "llava-pretrain": Source(
        "LLaVA-Pretrain: 558k captioned images of LAION, CC and SBU",
        (
            SourceFile(f"{_LLAVA}/LLaVA-Pretrain/resolve/main/blip_laion_cc_sbu_558k.json"),
            SourceFile(f"{_LLAVA}/LLaVA-Pretrain/resolve/main/images.zip", folder="images"),
        ),
        "make SET --llava OUT/blip_laion_cc_sbu_558k.json --images OUT/images",
    ),
    "textvqa": Source(
        "TextVQA 0.5.1: questions about text in images (7 GB)",
        (
            SourceFile(f"{_TEXTVQA}/data/TextVQA_0.5.1_train.json"),
            SourceFile(f"{_TEXTVQA}/data/TextVQA_0.5.1_val.json"),
            SourceFile(f"{_TEXTVQA}/images/train_val_images.zip"),
        ),
        "make SET --vqa OUT/TextVQA_0.5.1_train.json --images OUT/train_images",
    ),
    "vizwiz": Source(
        "VizWiz-VQA: questions by blind people about their own photos",
        (
            SourceFile(f"{_VIZWIZ}/vqa_data/Annotations.zip", folder="annotations"),
            SourceFile(f"{_VIZWIZ}/images/val.zip", folder="images"),
            SourceFile(f"{_VIZWIZ}/images/train.zip", folder="images"),
        ),
        "make SET --vqa OUT/annotations/train.json --images OUT/images/train",
    ),
    "conceptual-captions": Source(
        "Conceptual Captions: 3.3 million addresses with captions, their images through img2dataset",
        (SourceFile(f"{_CONCEPTUAL}/Train/GCC-training.tsv", columns=("caption", "url")),),
        "index OUT/shards",
        image_table="GCC-training.tsv",
    ),
}
