"""Small files under the names of published sets, and a server of them that breaks off, fails, forgets and lies."""

from __future__ import annotations

import hashlib
import io
import json
import time
import zipfile
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.support.shards import image_bytes
from tools.shards.sources import Source, SourceFile


def zipped(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, payload in files.items():
            archive.writestr(name, payload)
    return stream.getvalue()


def picture_zip(folder: str) -> bytes:
    return zipped({f"{folder}000{n}.png": image_bytes(n, (40, 30)) for n in range(3)})


CAPTIONS = {"images": [{"id": 1, "file_name": "0001.png"}], "annotations": [{"image_id": 1, "caption": "noise"}]}
TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Noise."}]
CHAT = [{"id": "1", "image": "0001.png", "conversations": TURNS}]
PRETRAIN = [{"id": "1", "image": "00000/0001.png", "conversations": TURNS}]
TEXTVQA = {
    "dataset_type": "train",
    "data": [
        {
            "question": "what does it say?",
            "image_id": "0001",
            "question_id": 0,
            "answers": ["nokia", "b", *["noise"] * 8],
        },
        {"question": "what brand?", "image_id": "0002", "question_id": 1, "answers": ["one", "two", "two", "one"]},
        {"question": "which colour?", "image_id": "0001", "question_id": 2, "answers": ["grey"] * 10},
    ],
}
VIZWIZ = [
    {
        "image": "0002.png",
        "question": "What is this?",
        "answers": [{"answer": text, "answer_confidence": "yes"} for text in ("unsuitable", "noise", "noise")],
        "answer_type": "other",
        "answerable": 1,
    },
    {
        "image": "0000.png",
        "question": "Is it on?",
        "answers": [{"answer": "unanswerable", "answer_confidence": "maybe"}] * 10,
        "answer_type": "unanswerable",
        "answerable": 0,
    },
]
REPLICA = {
    "annotations_trainval2017.zip": zipped({"annotations/captions_train2017.json": json.dumps(CAPTIONS).encode()}),
    "val2017.zip": picture_zip("val2017/"),
    "train2017.zip": picture_zip("train2017/"),
    "llava_instruct_150k.json": json.dumps(CHAT).encode(),
    "blip_laion_cc_sbu_558k.json": json.dumps(PRETRAIN).encode(),
    "images.zip": picture_zip("00000/"),
    "TextVQA_0.5.1_train.json": json.dumps(TEXTVQA).encode(),
    "TextVQA_0.5.1_val.json": b'{"data": []}',
    "train_val_images.zip": picture_zip("train_images/"),
    "Annotations.zip": zipped({"train.json": json.dumps(VIZWIZ).encode()}),
    "val.zip": picture_zip("val/"),
    "train.zip": picture_zip("train/"),
    "GCC-training.tsv": b"a cat\thttp://a/1.jpg\na dog\thttp://a/2.jpg\n",
}
"""Small files under the real names; they lie at the real paths."""


class Handler(BaseHTTPRequestHandler):
    """Serves `files` with ranges and tags; `troubles` are taken one a request, first things first."""

    files: dict[str, bytes]
    troubles: list[str]
    asked: list[tuple[str, str | None]]

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.asked.append((self.path.rsplit("/", 1)[-1], asked))
        trouble = self.troubles.pop(0) if self.troubles else ""
        payload = self.files.get(self.path)
        if payload is None or trouble.isdigit():
            self.send_error(int(trouble or 404))
            return
        tag = f'"{hashlib.sha256(payload).hexdigest()[:8]}"'
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and trouble != "no ranges" else 0
        if self.headers.get("If-Range", tag) != tag:
            start = 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(payload) - 1}/{len(payload)}")
        self.send_header("Content-Length", str(len(payload) - start))
        self.send_header("ETag", tag)
        self.end_headers()
        end = start + (len(payload) - start) // 2 if trouble in ("break off", "no ranges, break off") else len(payload)
        if trouble != "drip":
            self.wfile.write(payload[start:end])
            return
        with suppress(ConnectionError):  # who gave up
            for place in range(start, end):
                self.wfile.write(payload[place : place + 1])
                time.sleep(0.03)

    def log_message(self, *_arguments: Any) -> None:
        pass


def replica_of(source: Source) -> Source:
    """The same rows with the small files' sizes and checksums."""
    files = tuple(
        SourceFile(
            file.url,
            len(REPLICA[file.name]) if file.num_bytes is not None else None,
            hashlib.sha256(REPLICA[file.name]).hexdigest() if file.sha256 is not None else None,
            file.folder,
            file.columns,
        )
        for file in source.files
    )
    return Source(source.title, files, source.then, source.image_table)
