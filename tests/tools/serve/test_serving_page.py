"""The commands and the program of docs/serving.md, against a server as the page starts it."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from eval.predictor import Predictor
from tests.support import warm
from tests.support.paths import REPOSITORY
from tests.support.patience import GUARD_S
from tests.support.servers import MODEL, Running, file_of, running_server
from tools.serve.__main__ import main
from tools.serve.wire import ChatRequest

PAGE = (REPOSITORY / "docs" / "serving.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)
LINES = [line for block in BLOCKS for line in block.splitlines()]
CURLS = [line for line in LINES if line.startswith("curl ")]
ADDRESS = "http://127.0.0.1:8000"

needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")


@pytest.fixture(scope="module")
def shapes(tiny_predictor: Predictor) -> Iterator[Running]:
    with running_server(tiny_predictor) as running:
        yield running


def here(text: str, server: Running) -> str:
    """A line of the page with the test's server and model."""
    return text.replace(ADDRESS, server.url).replace('"shapes"', f'"{MODEL}"')


@needs_curl
def test_the_curl_lines_are_answered(shapes: Running, tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(file_of())
    seen = []
    for line in CURLS:
        words = [*shlex.split(here(line, shapes)), "-sS", "--fail-with-body", "--max-time", str(int(GUARD_S))]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        if "/metrics" in line:
            assert "sightline_requests_total" in done.stdout
        elif "DELETE" not in line:
            seen.append(set(json.loads(done.stdout)))
    assert len(CURLS) == 8
    assert {"caption", "tokens", "seconds"} in seen
    assert {"answer", "conversation_id", "tokens", "seconds"} in seen
    assert {"status", "model", "running", "waiting"} in seen


@pytest.mark.slow
def test_the_program_of_the_page_prints_an_answer(shapes: Running, tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(file_of())
    program = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)[0]
    command = [warm.python(), "-c", here(program, shapes)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_commands_that_start_servers_are_understood(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from tools.serve import arguments

    seen: list[Any] = []
    monkeypatch.setattr("tools.serve.command.run", lambda given: seen.append(arguments.settings_of(given)) or 0)
    for line in LINES:
        if line.startswith("sightline serve"):
            assert main(shlex.split(line)[2:]) == 0
    assert [settings.model for settings in seen] == ["shapes", "shapes"]


@pytest.mark.parametrize("name", ["n", "logprobs", "logit_bias", "tools", "temperature", "top_p", "seed", "stop"])
def test_fields_that_the_page_names_are_known(name: str) -> None:
    from tools.serve.wire import _NEUTRAL

    assert name in PAGE
    assert name in ChatRequest.model_fields or name in _NEUTRAL


def test_the_limits_of_the_page_are_the_defaults() -> None:
    from tools.serve.settings import Settings

    some = Settings(model="")
    for text in (
        f"a body: {some.limits.max_body_bytes // 10**6} MB",
        f"a picture: {some.limits.max_pixels // 10**6} megapixels",
        f"decoding: {some.limits.picture_bytes // 10**9} GB",
        f"requests of one key or address: {some.load.per_client}",
        f"answers at once: {some.load.rows}; waiting: {some.load.waiting}",
        f"until an answer begins: {some.times.queue_s:g} s",
        f"an answer: {some.times.answer_s:g} s, {some.limits.max_tokens} tokens",
        f"`--grace` ({some.times.grace_s:g} s)",
        f"({some.limits.default_tokens} unless given",
    ):
        assert text in PAGE
