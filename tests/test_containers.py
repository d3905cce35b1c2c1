"""The container files without Docker: what they copy, install, run and check is there, as in CI and in the server."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.paths import REPOSITORY

CONTAINERS = REPOSITORY / "containers"
SERVE, TRAIN, APPTAINER = CONTAINERS / "Dockerfile", CONTAINERS / "Dockerfile.train", CONTAINERS / "sightline.def"
INSTALL = "python -m pip install --no-cache-dir --constraint constraints.txt ."


def instructions(file: Path) -> list[tuple[str, str]]:
    """A Dockerfile's instructions in order, with their lines joined."""
    text = re.sub(r"(?m)^\s*#.*\n", "", file.read_text(encoding="utf-8")).replace("\\\n", " ")
    return [(line.split()[0], line.partition(" ")[2].strip()) for line in text.splitlines() if line.strip()]


def last_stage(file: Path) -> list[tuple[str, str]]:
    found = instructions(file)
    start = max(place for place, (name, _) in enumerate(found) if name == "FROM")
    return found[start:]


def value(found: list[tuple[str, str]], name: str) -> str:
    """What the last instruction of a name says."""
    return [said for word, said in found if word == name][-1]


def words_of(found: list[tuple[str, str]], name: str) -> list[str]:
    """An instruction in exec form, in which no shell stands between a signal and the process."""
    words = json.loads(value(found, name))
    assert isinstance(words, list)
    return words


@pytest.fixture
def compose() -> dict[str, Any]:
    return yaml.safe_load((CONTAINERS / "compose.yaml").read_text(encoding="utf-8"))["services"]


@pytest.mark.parametrize("file", [SERVE, TRAIN, APPTAINER], ids=lambda file: file.name)
def test_they_install_as_ci_does(file: Path) -> None:
    """The same packages of the system, the same constraints, in an environment of its own."""
    text = " ".join(file.read_text(encoding="utf-8").replace("\\\n", " ").split())
    makefile, ci = (REPOSITORY / "Makefile").read_text(), (REPOSITORY / ".ci/run").read_text()
    assert INSTALL in text
    assert "python -m pip install --constraint constraints.txt" in makefile
    assert "-m venv" in text
    assert "-m venv" in makefile
    packages = re.findall(r"apt-get install --yes --no-install-recommends ([\w+ ]+?) (?:&&|rm)", text)
    assert packages
    for package in " ".join(packages).split():
        assert f"missing+=({package})" in ci
    assert (REPOSITORY / "constraints.txt").is_file()


@pytest.mark.parametrize("file", [SERVE, TRAIN], ids=lambda file: file.name)
def test_what_they_copy_is_there_and_no_root_runs_it(file: Path) -> None:
    for name, said in instructions(file):
        if name == "COPY" and not said.startswith("--from"):
            assert (REPOSITORY / said.split()[0]).exists()
    left_out = (REPOSITORY / ".dockerignore").read_text().split()
    needed = {"setup.py", "pyproject.toml", "constraints.txt", "sightline.py", "recipes", "ds_configs", "tools", "eval"}
    assert not needed & set(left_out)
    assert ".git" in left_out
    user = value(last_stage(file), "USER").partition(":")[0]
    assert int(user) > 0
    python = re.search(r"FROM python:3\.(\d+)", file.read_text())
    assert python
    assert int(python[1]) >= 10


def test_the_image_serves_by_a_command_that_the_server_understands() -> None:
    from tools.cli import VERBS
    from tools.serve.__main__ import main

    stage = last_stage(SERVE)
    program, verb = words_of(stage, "ENTRYPOINT")
    assert f'"{program}=' in (REPOSITORY / "setup.py").read_text(encoding="utf-8"), "a console script"
    assert verb in VERBS
    words = words_of(stage, "CMD")
    assert "--workers" not in words
    assert _settings(main, words).host == "0.0.0.0"
    assert value(stage, "EXPOSE") == words[words.index("--port") + 1]
    variables = value(stage, "ENV")
    assert "HF_HUB_OFFLINE=1" in variables
    assert words_of(last_stage(TRAIN), "ENTRYPOINT") == ["sightline"]


def _settings(main: Any, words: list[str]) -> Any:
    """The arguments that a command line gives, checked as the server checks them."""
    from tools.serve import arguments, command

    seen: list[Any] = []
    before, command.run = command.run, lambda given: seen.append(given) or 0  # type: ignore[func-returns-value, assignment]
    try:
        assert main(words) == 0
    finally:
        command.run = before
    arguments.settings_of(seen[0])
    return seen[0]


@pytest.fixture
def health() -> Iterator[tuple[str, list[int]]]:
    """A server of one address, which answers with the status in the list."""
    import threading
    from http.server import BaseHTTPRequestHandler, HTTPServer

    status = [200]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status[0] if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            return None

    served = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{served.server_address[1]}", status
    served.shutdown()
    served.server_close()


def test_the_health_check_tells_the_two_apart(health: tuple[str, list[int]]) -> None:
    address, status = health
    said = value(last_stage(SERVE), "HEALTHCHECK")
    program, *words = json.loads(said.partition("CMD ")[2])
    assert program == "python"
    words = [word.replace("127.0.0.1:8000", address) for word in words]
    assert subprocess.run([sys.executable, *words], capture_output=True, check=False).returncode == 0
    status[0] = 503
    assert subprocess.run([sys.executable, *words], capture_output=True, check=False).returncode != 0


def test_compose_serves_read_only_with_prometheus_beside_it(compose: dict[str, Any]) -> None:
    from tools.serve.__main__ import main

    server, prometheus = compose["sightline"], compose["prometheus"]
    assert (CONTAINERS / server["build"]["context"]).resolve() == REPOSITORY
    assert (REPOSITORY / server["build"]["dockerfile"]).is_file()
    given = _settings(main, server["command"])
    assert server["read_only"] is True
    assert server["volumes"][0].endswith(f":{given.bundle}:ro")
    assert str(given.api_keys) == f"/run/secrets/{server['secrets'][0]}"
    assert all(port.startswith("127.0.0.1:") for each in compose.values() for port in each["ports"])
    assert int(server["stop_grace_period"].rstrip("s")) > given.grace
    for mounted in prometheus["volumes"]:
        source, target, mode = mounted.split(":")
        assert (CONTAINERS / source).is_file()
        assert f"--config.file={target}" in prometheus["command"]
        assert mode == "ro"
    scrape = yaml.safe_load((CONTAINERS / "prometheus.yaml").read_text())["scrape_configs"][0]
    assert scrape["static_configs"][0]["targets"] == [f"sightline:{given.port}"]
    assert scrape["authorization"]["credentials_file"] == f"/run/secrets/{prometheus['secrets'][0]}"


def test_apptainer_runs_the_installed_command() -> None:
    text = APPTAINER.read_text(encoding="utf-8")
    place = re.search(r"python3 -m venv (\S+)", text)
    assert place
    assert f"export PATH={place[1]}/bin:$PATH" in text
    assert re.search(r"%runscript\s+exec sightline \"\$@\"", text)
    assert (REPOSITORY / re.search(r"%files\s+(\S+)", text)[1]).is_dir()  # type: ignore[index]


def test_a_path_below_the_server_s_metrics_is_what_prometheus_asks() -> None:
    from tools.serve.metrics import ENDPOINTS

    scrape = yaml.safe_load((CONTAINERS / "prometheus.yaml").read_text())["scrape_configs"][0]
    assert scrape["metrics_path"] in ENDPOINTS
