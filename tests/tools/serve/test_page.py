"""The demo without a browser: what a visitor may send, and what comes back."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import secrets
import socket
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
from gradio_client import Client, handle_file

from models.common.errors import run_cli
from tests.support import warm
from tests.support.bundles import image, make_bundle
from tests.support.pages import page_client, running_page
from tests.support.paths import REPOSITORY
from tests.support.patience import GUARD_S
from tools.serve.demo import main

pytestmark = pytest.mark.slow
"""Each talks to a page in a process of its own."""

LENGTHS = {"temperature": 0, "top_p": 1, "length": 60, "beams": 1}


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_page(tmp_path_factory.mktemp("page")) as url:
        yield url


@pytest.fixture
def client(address: str) -> Client:
    return page_client(address)


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photos") / "photo.png"
    image("circle").save(path)
    return path


def ask(client: Client, image_file: Any, question: str, **changes: Any) -> list[tuple[Any, ...]]:
    """All updates that one question brings, in order."""
    options = {**LENGTHS, **changes}
    job = client.submit(image_file, question, *options.values(), api_name="/ask")
    job.result(timeout=GUARD_S)
    return list(job.outputs())


def texts(update: tuple[Any, ...]) -> list[str]:
    """The chat's turns as the page shows them."""
    return ["".join(part["text"] for part in message["content"]) for message in update[0]]


def notice_of(update: tuple[Any, ...]) -> str:
    return next((value for value in update if isinstance(value, str) and 'class="notice"' in value), "")


def test_an_answer_grows_piece_by_piece_and_its_speed_is_told(client: Client, photo: Path) -> None:
    updates = ask(client, handle_file(photo), "What is in the image?")
    answers = [texts(update)[1] for update in updates]
    assert all(texts(update)[0] == "What is in the image?" for update in updates)
    growing = sorted(set(answers), key=len)
    assert len(growing) >= 3
    assert all(longer.startswith(shorter) for shorter, longer in pairwise(growing))
    assert any("tokens/s" in str(value) for value in updates[-1])
    assert not notice_of(updates[-1])


def test_a_second_question_is_asked_with_its_history(client: Client, photo: Path) -> None:
    first = texts(ask(client, handle_file(photo), "What is it?")[-1])
    both = texts(ask(client, handle_file(photo), "Which colour?")[-1])
    assert both[:3] == [*first, "Which colour?"]
    fresh = page_client(client.src)
    alone = texts(ask(fresh, handle_file(photo), "Which colour?")[-1])
    assert alone[1] != both[3], "the history must have mattered"


def test_another_image_begins_another_chat(client: Client, photo: Path, tmp_path: Path) -> None:
    ask(client, handle_file(photo), "What is it?")
    image("square").save(tmp_path / "other.png")
    assert len(texts(ask(client, handle_file(tmp_path / "other.png"), "And this?")[-1])) == 2


def test_visitors_do_not_see_each_others_chats(address: str, photo: Path) -> None:
    clients = [page_client(address) for _ in range(2)]
    ask(clients[0], handle_file(photo), "What is it?")
    assert len(texts(ask(clients[1], handle_file(photo), "Which colour?")[-1])) == 2


def test_again_answers_the_last_question_anew(client: Client, photo: Path) -> None:
    before = texts(ask(client, handle_file(photo), "What is it?", temperature=1)[-1])
    job = client.submit(1, 1, 60, 1, api_name="/again")
    job.result(timeout=GUARD_S)
    after = texts(job.outputs()[-1])
    assert after[0] == before[0]
    assert after[1] != before[1]


def test_text_that_looks_like_html_is_shown_as_it_is(client: Client) -> None:
    shown = texts(ask(client, None, "<script>alert(1)</script> & <image>")[-1])
    assert shown[0] == "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &lt;image&gt;"


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("text.png", b"this is no image", "no image"),
        ("cut.jpg", b"\xff\xd8\xff\xe0\x00\x10JFIF", "no image"),
        ("drawing.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no image"),
    ],
)
def test_a_bad_file_is_one_line_on_a_page_that_lives(
    client: Client, tmp_path: Path, photo: Path, name: str, content: bytes, reason: str
) -> None:
    (tmp_path / name).write_bytes(content)
    update = ask(client, handle_file(tmp_path / name), "What is it?")[-1]
    assert reason in notice_of(update)
    assert "Traceback" not in str(update)
    assert len(texts(ask(client, handle_file(photo), "What is it?")[-1])) == 2


def test_too_many_bytes_are_refused_by_the_server(client: Client, tmp_path: Path, photo: Path) -> None:
    (tmp_path / "huge.png").write_bytes(bytes(51_000_000))
    with pytest.raises(Exception, match=r"(?i)size|413|large"):
        ask(client, handle_file(tmp_path / "huge.png"), "What is it?")
    assert len(texts(ask(client, handle_file(photo), "What is it?")[-1])) == 2


def test_a_body_that_is_no_upload_is_bounded_too(address: str, client: Client, photo: Path) -> None:
    connection = http.client.HTTPConnection(address.split("/")[2], timeout=GUARD_S)
    connection.putrequest("POST", "/gradio_api/queue/join")
    connection.putheader("Content-Length", "90000000")
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()

    def endless() -> Iterator[bytes]:
        for _ in range(100):
            yield bytes(1_000_000)

    with pytest.raises((httpx.HTTPError, AssertionError)):
        assert httpx.post(f"{address}gradio_api/queue/join", content=endless(), timeout=GUARD_S).status_code < 400
    assert len(texts(ask(client, handle_file(photo), "What is it?")[-1])) == 2


def test_behind_the_page_the_api_refuses_what_is_not_its_own(address: str) -> None:
    for path, status in (("v1/chat/completions", 405), ("health", 200), ("v1/nothing", 404), ("v1/models", 200)):
        answer = httpx.get(address + path, timeout=GUARD_S)
        assert answer.status_code == status
        assert status == 200 or answer.json()["error"]["message"]
    assert httpx.delete(address + "health", timeout=GUARD_S).status_code == 405


def test_too_many_pixels_are_refused_from_the_header(client: Client, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("1", (11_000, 11_000)).save(tmp_path / "bomb.png")
    assert "pixels" in notice_of(ask(client, handle_file(tmp_path / "bomb.png"), "What is it?")[-1])


@pytest.mark.parametrize(
    ("question", "reason"),
    [("   ", "no question"), ("x" * 5000, "5000 characters"), ("many shapes? " * 300, "shorten it")],
)
def test_a_bad_question_is_one_line(client: Client, photo: Path, question: str, reason: str) -> None:
    assert reason in notice_of(ask(client, handle_file(photo), question)[-1])


def test_settings_outside_their_sliders_are_refused(client: Client, photo: Path) -> None:
    with pytest.raises(Exception, match="maximum value"):
        ask(client, handle_file(photo), "What?", temperature=3)


@pytest.mark.parametrize(
    "source", ["/etc/passwd", "http://127.0.0.1:1/x.png", "http://169.254.169.254/x.png", "https://example.org/x.png"]
)
def test_neither_server_files_nor_addresses_are_read_as_uploads(address: str, source: str) -> None:
    fields = [{"path": source, "meta": {"_type": "gradio.FileData"}}, "What is it?", *LENGTHS.values()]
    started = httpx.post(f"{address}gradio_api/call/ask", json={"data": fields})
    events = httpx.get(f"{address}gradio_api/call/ask/{started.json()['event_id']}", timeout=GUARD_S).text
    assert "event: error" in events
    assert "root:" not in events


@pytest.mark.parametrize("url", ["http://127.0.0.1/x.png", "http://169.254.169.254/", "ftp://x/y", "photo.jpg"])
def test_only_public_addresses_are_fetched(client: Client, url: str) -> None:
    result = client.predict(url, api_name="/fetch")
    assert 'class="notice"' in str(result[-1])


def test_beams_answer_in_one_piece(client: Client, photo: Path) -> None:
    updates = ask(client, handle_file(photo), "What is it?", beams=3, length=8)
    assert texts(updates[-1])[1]


def test_a_failed_question_leaves_the_chat_as_it_was(client: Client, photo: Path) -> None:
    assert "shorten it" in notice_of(ask(client, handle_file(photo), "many shapes? " * 300)[-1])
    assert len(texts(ask(client, handle_file(photo), "What is it?")[-1])) == 2


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["nowhere"], "nowhere"),
        (["x", "--port", "99999"], "99999"),
        (["x", "--examples", "none"], "none"),
        (["x", "--root-path", "sub"], "sub"),
    ],
)
def test_a_bad_command_line_is_one_line_and_exit_code_2(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(main, arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert named in error


def test_a_port_that_is_taken_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert run_cli(main, [str(make_bundle(tmp_path / "bundle")), "--device", "cpu", "--port", port]) == 2
    assert f"--port {port} is taken" in capsys.readouterr().err


def test_a_bundle_with_a_file_missing_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "bundle")
    (folder / "model.safetensors").unlink()
    done = subprocess.run(
        [warm.python(), "-m", "tools.demo", str(folder)],
        cwd=REPOSITORY,
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "model.safetensors" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_slow_browser_gets_the_answer_to_what_it_asks_as_the_last_one_ends(address: str) -> None:
    """It learns late that the stream of messages was closed, and opens a new one only if it knows when it is let in."""
    endpoints = httpx.get(f"{address}config").json()["dependencies"]
    fetch = next(number for number, endpoint in enumerate(endpoints) if endpoint["api_name"] == "fetch")

    async def scene() -> None:
        async with httpx.AsyncClient(base_url=f"{address}gradio_api/", timeout=GUARD_S) as client:
            browser = SlowBrowser(client, fetch)
            for _ in range(3):
                await asyncio.wait_for(browser.ask(), GUARD_S / 10)
            browser.close()

    asyncio.run(scene())


class SlowBrowser:
    """Gradio's client as far as its messages go, which sees each of them some time after it came."""

    LATE_S = 0.4

    def __init__(self, client: httpx.AsyncClient, function: int) -> None:
        self._client, self._session = client, secrets.token_hex(8)
        self._body = {"data": ["no address"], "fn_index": function, "session_hash": self._session}
        self._is_open, self._streams = False, []
        self._completed: asyncio.Queue[str] = asyncio.Queue()

    async def ask(self) -> None:
        """Join, listen where no stream is thought to be open, and wait for the end."""
        joined = (await self._client.post("queue/join", json=self._body)).json()["event_id"]
        if not self._is_open:
            self._is_open = True
            self._streams.append(asyncio.ensure_future(self._listen()))
        while await self._completed.get() != joined:
            pass

    def close(self) -> None:
        for stream in self._streams:
            stream.cancel()

    async def _listen(self) -> None:
        later = asyncio.get_running_loop().call_later
        async with self._client.stream("GET", "queue/data", params={"session_hash": self._session}) as response:
            async for line in response.aiter_lines():
                message = json.loads(line.removeprefix("data: ") or "{}")
                if message.get("msg") == "process_completed":
                    self._completed.put_nowait(message["event_id"])
                if message.get("msg") == "close_stream":
                    later(self.LATE_S, setattr, self, "_is_open", False)
