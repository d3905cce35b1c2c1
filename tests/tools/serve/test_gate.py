"""Who is let in: keys, host names, other sites; and what the log says of a visit."""

from __future__ import annotations

import base64
import logging
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from eval.predictor import Predictor
from models.common.errors import InputError
from tests.support.patience import GUARD_S, wait_until
from tests.support.servers import Running, asking, picture_part, running_server
from tools.serve.keys import Keys

ALICE, BOB = "a" * 24, "b" * 24


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    (tmp_path / "keys").write_text(f"# NAME KEY\nalice {ALICE}\n\nbob  {BOB}\n")
    return Keys.read(tmp_path / "keys")


@pytest.fixture(scope="module")
def locked(tiny_predictor: Predictor, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(f"alice {ALICE}\n")
    with running_server(tiny_predictor, keys=Keys.read(file), origins=("https://friend.example",)) as running:
        yield running


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def basic(key: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"anybody:{key}".encode()).decode()}


def test_a_key_tells_whose_it_is(keys: Keys) -> None:
    assert keys.name_of(f"Bearer {ALICE}", basic=False) == "alice"
    assert keys.name_of(f"bearer  {BOB}", basic=False) == "bob"
    assert keys.name_of(basic(BOB)["Authorization"], basic=True) == "bob"
    for wrong in ("", "Bearer", f"Bearer {ALICE}x", "Bearer \udcff", ALICE, basic(BOB)["Authorization"], "Basic @@"):
        assert keys.name_of(wrong, basic=False) is None
    assert not Keys()
    assert ALICE not in str(vars(keys))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("alice", "line 1: write NAME KEY"),
        ("alice short", "fewer than 16"),
        (f"alice {ALICE}\nalice {BOB}", "line 2: this name or key"),
        (f"alice {ALICE}\nbob {ALICE}", "line 2: this name or key"),
        ("# nothing", "holds no key"),
    ],
)
def test_a_bad_file_of_keys_is_one_line(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "keys").write_text(text)
    with pytest.raises(InputError, match=problem):
        Keys.read(tmp_path / "keys")
    with pytest.raises(InputError, match="is no file of text"):
        Keys.read(tmp_path / "none")


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/docs", "/nothing"])
def test_without_a_key_there_is_nothing_but_health(locked: Running, path: str) -> None:
    for headers in ({}, bearer("wrong" * 5)):
        answer = httpx.get(locked.url + path, headers=headers, timeout=GUARD_S)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"].startswith(
            "Bearer" if path in ("/v1/models", "/metrics") else "Basic"
        )
        assert answer.json()["error"]["code"] == "invalid_api_key"
    assert httpx.get(locked.url + "/health", timeout=GUARD_S).status_code == 200
    assert httpx.get(locked.url + path, headers=bearer(ALICE), timeout=GUARD_S).status_code in (200, 404)


def test_a_browser_s_password_opens_the_documentation_and_not_the_api(locked: Running) -> None:
    assert httpx.get(locked.url + "/docs", headers=basic(ALICE), timeout=GUARD_S).status_code == 200
    assert httpx.get(locked.url + "/v1/models", headers=basic(ALICE), timeout=GUARD_S).status_code == 401


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:80", 200),
        ("localhost", 200),
        ("[::1]:8000", 200),
        ("10.1.2.3", 200),
        ("evil.example", 403),
        ("evil.example:8000", 403),
        ("127.0.0.1.evil.example", 403),
        ("", 403),
        ("a:b:c", 403),
        ("[::1", 403),
    ],
)
def test_other_sites_names_for_this_machine_are_refused(server: Running, host: str, status: int) -> None:
    answer = httpx.get(server.url + "/v1/models", headers={"Host": host}, timeout=GUARD_S)
    assert answer.status_code == status
    if status == 403:
        assert "--allow-host" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("origin", "host", "status"),
    [
        ("", "127.0.0.1:8000", 200),
        ("http://127.0.0.1:8000", "127.0.0.1:8000", 200),
        ("https://localhost", "localhost", 200),
        ("https://localhost:8443", "localhost", 200),
        ("http://127.0.0.1:3000", "127.0.0.1:8000", 403),
        ("https://evil.example", "127.0.0.1:8000", 403),
        ("null", "127.0.0.1:8000", 403),
        ("http://[", "127.0.0.1:8000", 403),
    ],
)
def test_other_sites_pages_may_not_ask(server: Running, origin: str, host: str, status: int) -> None:
    headers = {"Host": host, **({"Origin": origin} if origin else {})}
    assert httpx.get(server.url + "/v1/models", headers=headers, timeout=GUARD_S).status_code == status


def test_a_named_site_may_ask_in_a_browser_and_no_other(locked: Running, server: Running) -> None:
    asks = {"Origin": "https://friend.example", "Access-Control-Request-Method": "POST"}
    allowed = httpx.options(locked.url + "/v1/chat/completions", headers=asks, timeout=GUARD_S)
    assert allowed.status_code == 204
    assert allowed.headers["access-control-allow-origin"] == "https://friend.example"
    assert "access-control-allow-credentials" not in allowed.headers
    answer = httpx.get(locked.url + "/v1/models", headers={**asks, **bearer(ALICE)}, timeout=GUARD_S)
    assert answer.headers["access-control-allow-origin"] == "https://friend.example"
    refused = httpx.get(locked.url + "/v1/models", headers=asks, timeout=GUARD_S)
    assert (refused.status_code, "access-control-allow-origin" in refused.headers) == (401, True)
    for other in (locked, server):
        asks["Origin"] = "https://evil.example"
        answer = httpx.options(other.url + "/v1/chat/completions", headers=asks, timeout=GUARD_S)
        assert answer.status_code == 403
        assert "access-control-allow-origin" not in answer.headers


def test_the_log_has_one_line_a_visit_and_nothing_of_its_content(
    locked: Running, caplog: pytest.LogCaptureFixture
) -> None:
    body = asking(picture_part(), "a very private question")
    with caplog.at_level(logging.INFO, logger="tools.serve.gate"):
        answer = httpx.post(f"{locked.url}/v1/chat/completions", json=body, headers=bearer(ALICE), timeout=GUARD_S)
        locked.until_idle()
        number = answer.headers["x-request-id"]

        def lines() -> list[str]:
            return [text for text in (record.getMessage() for record in caplog.records) if text.startswith(number)]

        wait_until("the visit is in the log", lines)  # it is written after the answer has gone out
    (line,) = lines()
    assert line.startswith(f"{number} alice POST /v1/chat/completions 200 finish=")
    assert "tokens=12" in line
    text = answer.json()["choices"][0]["message"]["content"]
    assert not any(part in caplog.text for part in ("private", ALICE, "base64", text))
