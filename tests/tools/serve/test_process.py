"""The server as a process of its own: how it begins, what its end does to who is being answered, what it leaves."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from models.common.errors import run_cli
from tests.support import warm
from tests.support.paths import REPOSITORY
from tests.support.patience import GUARD_S
from tests.support.served import SLOW_MODEL, served
from tests.support.servers import asking, picture_part
from tools.cli import dispatch
from trainer.distributed.ports import choose_port

PROGRAM = f"""{SLOW_MODEL.format(pause_s=0.02)}
from tools.cli import main
sys.exit(main())
"""

LONG = {"max_tokens": 300, "temperature": 2.0, "seed": 3}


@contextmanager
def serving(bundle: Path, folder: Path, *words: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`sightline serve` until the block ends: the process, and its address."""
    command = ["serve", str(bundle), "--device", "cpu", "--port", str(choose_port()), *words]
    with served(PROGRAM, command, folder, r"serving tiny at (\S+)/$") as found:
        yield found


def ended_well(text: str) -> bool:
    """Whether a stream came to its end, or says why not."""
    last = text.strip().split("\n\n")[-1].removeprefix("data: ")
    return last == "[DONE]" or "error" in json.loads(last)


@pytest.mark.slow
@pytest.mark.parametrize("grace_s", ["60", "0.3"])
def test_at_sigterm_every_accepted_request_is_answered_or_told(tiny_bundle: Path, tmp_path: Path, grace_s: str) -> None:
    with serving(tiny_bundle, tmp_path, "--grace", grace_s, "--rows", "4") as (process, url):
        bodies = [asking(picture_part(), f"What is {number}?", stream=number % 2 == 0, **LONG) for number in range(8)]
        with ThreadPoolExecutor(8) as pool, httpx.Client(timeout=10 * GUARD_S) as client:
            sent = [pool.submit(client.post, f"{url}/v1/chat/completions", json=body) for body in bodies]
            deadline_s = time.monotonic() + GUARD_S
            while (health := httpx.get(f"{url}/health").json())["running"] + health["waiting"] < 8:
                assert time.monotonic() < deadline_s, health
                time.sleep(0.02)
            process.send_signal(signal.SIGTERM)
            if grace_s == "60":
                while httpx.get(f"{url}/health").json()["status"] != "draining":
                    time.sleep(0.02)
                refused = httpx.post(f"{url}/v1/chat/completions", json=bodies[0])
                assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
                assert httpx.get(f"{url}/health").status_code == 503
            answers = [each.result() for each in sent]
        for answer, body in zip(answers, bodies, strict=True):
            if answer.status_code == 200 and body["stream"]:
                assert ended_well(answer.text), answer.text[-300:]
            elif answer.status_code == 503:
                assert answer.json()["error"]["code"] in ("draining", "dead")
                assert int(answer.headers["retry-after"]) > 0
            else:
                assert answer.status_code == 200
        assert all(answer.status_code == 200 for answer in answers) == (grace_s == "60")
        assert process.wait(GUARD_S) == 0
        assert not list((tmp_path / "tmp").iterdir()), "nothing of a visitor's stays"
    log = (tmp_path / "log").read_text()
    assert re.search(r"closing: \d answers are written, \d wait", log)
    assert "Traceback" not in log


@pytest.mark.slow
def test_a_second_signal_ends_at_once(tiny_bundle: Path, tmp_path: Path) -> None:
    with serving(tiny_bundle, tmp_path, "--grace", "600") as (process, url):
        body = asking("What?", stream=True, **LONG)
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=GUARD_S) as answer:
            next(answer.iter_lines())
            process.send_signal(signal.SIGTERM)
            deadline_s = time.monotonic() + GUARD_S
            while "closing: 1" not in (tmp_path / "log").read_text():
                assert time.monotonic() < deadline_s
                time.sleep(0.02)
            process.send_signal(signal.SIGTERM)
            assert process.wait(GUARD_S) == 128 + signal.SIGTERM
        assert not list((tmp_path / "tmp").iterdir())


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["nowhere"], "nowhere"),
        (["x", "--port", "99999"], "99999"),
        (["x", "--host", "0.0.0.0"], "give --api-keys FILE, or say --without-keys"),
        (["x", "--host", "0.0.0.0", "--api-keys", "gone"], "--api-keys gone is no file"),
        (["x", "--cors", "https://a.example/path"], "without a path"),
        (["x", "--cors", "*"], "give a site"),
        (["x", "--rows", "0"], "--rows 0: take a number above 0"),
        (["x", "--picture-gb", "0"], "--picture-gb 0.0"),
        (["x", "--waiting", "-1"], "--waiting -1"),
    ],
)
def test_a_bad_command_line_is_one_line_and_exit_code_2(
    words: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(dispatch, ["serve", *words]) == 2
    error = capsys.readouterr().err
    assert problem in error
    assert error.count("\n") == 1


@pytest.mark.slow
def test_a_bundle_that_cannot_be_opened_ends_the_server(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["serve", str(tiny_bundle), "--device", "cuda:77", "--port", str(choose_port())]
    done = subprocess.run(
        [warm.python(), "-m", "tools.cli", *words], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "cuda:77" in done.stderr
    assert "Traceback" not in done.stderr
