"""A page that ends leaves nothing of a visitor behind, and tells those who wait."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from gradio_client import handle_file

from tests.support.bundles import image, make_bundle
from tests.support.pages import page_client
from tests.support.patience import GUARD_S
from tests.support.served import SLOW_MODEL, served
from tools.serve.lifetime import forget_old, own_folder

LONG = {"temperature": 2, "top_p": 1, "length": 400, "beams": 1}
PROGRAM = f"""{SLOW_MODEL.format(pause_s=0.1)}
from tools.serve.demo import main
sys.exit(main(sys.argv[1:]))
"""


def test_its_folder_holds_all_temporary_files_and_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    before = tempfile.gettempdir()
    with own_folder() as folder:
        assert Path(tempfile.mkdtemp()).parent == folder
        assert os.environ["GRADIO_TEMP_DIR"] == str(folder)
    assert not folder.exists()
    assert tempfile.gettempdir() == before


def test_old_files_and_those_that_are_too_many_are_forgotten(tmp_path: Path) -> None:
    now_s = time.time()
    for number in range(6):
        file = tmp_path / f"{number}" / "photo.png"
        file.parent.mkdir()
        file.write_bytes(bytes(100))
        os.utime(file, (now_s - 100 * number, now_s - 100 * number))
    forget_old(tmp_path, kept_s=350, max_bytes=1000)
    assert sorted(path.parent.name for path in tmp_path.rglob("*.png")) == ["0", "1", "2", "3"]
    forget_old(tmp_path, kept_s=350, max_bytes=250)
    assert sorted(path.parent.name for path in tmp_path.rglob("*.png")) == ["0", "1"]


@contextmanager
def serving(folder: Path, *, drain_s: float) -> Iterator[tuple[subprocess.Popen[str], str, Path]]:
    """The page as a process of its own: it, its address, and where it may write."""
    words = [str(make_bundle(folder / "bundle")), "--device", "cpu", "--grace", str(drain_s)]
    with served(PROGRAM, words, folder, r"the page is at (\S+)") as (process, address):
        yield process, address, folder / "tmp"


def ask_at_length(address: str, folder: Path) -> Any:
    """A question with an upload whose answer is being written."""
    image("circle").save(folder / "photo.png")
    client = page_client(address)
    job = client.submit(handle_file(folder / "photo.png"), "What is it?", *LONG.values(), api_name="/ask")
    deadline_s = time.monotonic() + GUARD_S
    while len(job.outputs()) < 2 and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert len(job.outputs()) >= 2
    return job


@pytest.mark.slow
@pytest.mark.parametrize("drain_s", [0.5, 10 * GUARD_S])
def test_at_sigterm_an_answer_ends_or_is_told_and_nothing_is_left(tmp_path: Path, drain_s: float) -> None:
    with serving(tmp_path, drain_s=drain_s) as (process, address, place):
        job = ask_at_length(address, tmp_path)
        assert [path.name for path in place.rglob("*.png")], "the upload must have been there"
        process.send_signal(signal.SIGTERM)
        last = job.result(timeout=10 * GUARD_S)
        is_told = "the page is closing, and this answer ends here" in str(last)
        assert is_told == (drain_s < GUARD_S)
        assert "token" in str(last), "it is a whole update either way"
        assert process.wait(timeout=GUARD_S) == 0
        assert not list(place.iterdir())
        with pytest.raises(httpx.HTTPError):
            httpx.get(address)


@pytest.mark.slow
def test_a_second_sigterm_ends_at_once_and_leaves_nothing(tmp_path: Path) -> None:
    with serving(tmp_path, drain_s=10 * GUARD_S) as (process, address, place):
        ask_at_length(address, tmp_path)
        process.send_signal(signal.SIGTERM)
        deadline_s = time.monotonic() + GUARD_S
        while "closing: 1 answers" not in (tmp_path / "log").read_text() and time.monotonic() < deadline_s:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=GUARD_S) == 128 + signal.SIGTERM
        assert not list(place.iterdir())


@pytest.mark.slow
def test_while_joins_pile_up_that_nobody_listens_to_another_gets_an_answer(tmp_path: Path) -> None:
    with serving(tmp_path, drain_s=0.5) as (_, address, _):
        functions = httpx.get(f"{address}config", timeout=GUARD_S).json()["dependencies"]
        asking = next(function for function in functions if function["api_name"] == "ask")
        for number in range(40):
            body = {"data": [None, None, "What?", 0, 1, 400, 1], "fn_index": asking["id"], "session_hash": f"s{number}"}
            httpx.post(f"{address}gradio_api/queue/join", json=body, timeout=GUARD_S)
        client = page_client(address)
        answer = client.submit(None, "What is it?", 0, 1, 5, 1, api_name="/ask").result(timeout=GUARD_S)
        assert "token" in str(answer)
