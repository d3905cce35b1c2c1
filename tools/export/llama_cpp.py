"""llama.cpp's own answers about pictures, in a process of its own: tools.export.llama_cpp MODEL MMPROJ < ASKED.

    stdin:  [{"image": a data: address, "question": ..., "num_tokens": ...}, ...]
    stdout: [{"text": ..., "num_prompt": ..., "top": [[[token id, logarithm of its probability], ...], ...]}, ...]

By the package xllamacpp, which holds llama.cpp for CPUs; a fault of it ends this process and no other.
"""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.common.documents import parse
from models.common.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

TOP = 10
"""How many of the likeliest tokens llama.cpp names."""


@dataclass(frozen=True)
class Answer:
    """An answer, the number of its prompt's tokens, and for each token the likeliest ones: (text, log probability)."""

    text: str
    num_prompt: int
    top: tuple[tuple[tuple[int, float], ...], ...]


def is_installed() -> bool:
    """Whether the package xllamacpp is there."""
    return find_spec("xllamacpp") is not None


def ask(model: Path, mmproj: Path, asked: list[tuple[Image, str]], num_tokens: int) -> list[Answer]:
    """llama.cpp's greedy answers.

    Raises:
        InputError: it cannot open the files, or stops.
    """
    questions = [
        {"image": _address(image), "question": question, "num_tokens": num_tokens} for image, question in asked
    ]
    command = [sys.executable, "-m", "tools.export.llama_cpp", str(model.resolve()), str(mmproj.resolve())]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(each for each in sys.path if each)}
    done = subprocess.run(
        command, input=json.dumps(questions), capture_output=True, text=True, check=False, env=environment
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("[")]
    if done.returncode or not lines:
        last = " ".join((done.stderr.strip() or "without a word").splitlines()[-3:])[-400:]
        raise InputError(f"{model}: llama.cpp does not answer ({done.returncode}): {last}")
    return [
        Answer(each["text"], each["num_prompt"], tuple(tuple((t, p) for t, p in step) for step in each["top"]))
        for each in parse(lines[-1], "llama.cpp")
    ]


def _address(image: Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def main(model: str, mmproj: str) -> None:
    """Answer what stdin asks."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.mmproj.path = model, mmproj
    params.n_parallel, params.warmup, params.use_jinja = 1, False, True
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.n_ctx, params.n_gpu_layers, params.fit_params = 2048, 0, False
    params.mmproj_use_gpu = False
    server = xllamacpp.Server(params)
    found = [_asked(server, each) for each in parse(sys.stdin.read(), "stdin")]
    print("\n" + json.dumps(found), flush=True)
    os._exit(0)  # the server's threads would wait for further questions


def _asked(server: Any, each: dict[str, Any]) -> dict[str, Any]:
    content = [
        {"type": "image_url", "image_url": {"url": each["image"]}},
        {"type": "text", "text": each["question"]},
    ]
    request = {
        "messages": [{"role": "user", "content": content}],
        "temperature": 0.0,
        "max_tokens": each["num_tokens"],
        "logprobs": True,
        "top_logprobs": TOP,
        "cache_prompt": False,
    }
    reply = server.handle_chat_completions(request)
    if "choices" not in reply:
        raise RuntimeError(json.dumps(reply)[:400])
    (choice,) = reply["choices"]
    steps = (choice.get("logprobs") or {}).get("content") or []
    top = [[[entry["id"], entry["logprob"]] for entry in step["top_logprobs"]] for step in steps]
    return {"text": choice["message"]["content"], "num_prompt": reply["usage"]["prompt_tokens"], "top": top}


if __name__ == "__main__":
    main(*sys.argv[1:])
