"""A demo page: inside the test's own process over a tiny random bundle, or asked as a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import unescape
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING
from unittest.mock import patch

from tests.support.bundles import image, make_bundle
from tests.support.patience import GUARD_S

if TYPE_CHECKING:
    from gradio_client import Client

    from tests.support.servers import Running

_ADDRESS = re.compile(r"the page is at (\S+)")
PAGE_TOKENS = 60
"""Length of an answer that `answer_of_page` asks for."""


@contextmanager
def running_page(folder: Path, *, with_examples: bool = False, root_path: str | None = None) -> Iterator[str]:
    """Serve a page from `folder` and give its address; it is closed afterwards."""
    with page_server(folder, with_examples=with_examples, root_path=root_path) as server:
        yield f"{server.url}/"


@contextmanager
def page_server(folder: Path, *, with_examples: bool = False, root_path: str | None = None) -> Iterator[Running]:
    """Serve a page from `folder` and give its server."""
    from eval.predictor import Predictor
    from tests.support.servers import running_server

    predictor = Predictor.open(make_bundle(folder / "bundle"), device="cpu")
    examples = []
    for kind in ("circle", "square") if with_examples else ():
        examples.append(folder / f"{kind}.png")
        image(kind).save(examples[-1])
    (folder / "kept").mkdir()
    with (
        patch.dict(os.environ, GRADIO_TEMP_DIR=str(folder / "kept")),
        running_server(predictor, page=folder / "kept", examples=examples, root_path=root_path or "") as server,
    ):
        yield server


def page_client(address: str) -> Client:
    """Gradio's client of a page, which by itself gives a busy machine five seconds for each of its requests."""
    from gradio_client import Client

    return Client(address, verbose=False, analytics_enabled=False, httpx_kwargs={"timeout": GUARD_S})


def answer_of_page(
    command: Sequence[str], photo: Path, question: str, *, where: Path, variables: Mapping[str, str] | None = None
) -> str:
    """Start `sightline demo` as a process, ask one question as a visitor would, greedily, and end it.

    Gradio cleans a message as a docstring: tabs are spaces in it (`inspect.cleandoc`). It escapes what HTML would read,
    which is undone here.
    """
    from gradio_client import handle_file

    with TemporaryFile("w+") as errors:  # in a pipe that nobody reads, many warnings would stop it
        process = subprocess.Popen(command, cwd=where, env=variables, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            assert process.stdout is not None
            address = next((found[1] for line in process.stdout if (found := _ADDRESS.search(line))), None)
            if address is None:
                errors.seek(0)
                raise AssertionError(errors.read()[-3000:])
            client = page_client(address)
            job = client.submit(handle_file(photo), question, 0, 1, PAGE_TOKENS, 1, api_name="/ask")
            job.result()
            chat = job.outputs()[-1][0]
            return unescape("".join(part["text"] for part in chat[-1]["content"]))
        finally:
            process.terminate()
            process.communicate(timeout=GUARD_S)
