"""wandb is a copy of the JSONL files: what it missed is sent later, once, and only a wrong key ends a start."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import wandb

from models.common.errors import InputError
from trainer.config.schema import TrackingConfig, WandbConfig
from trainer.tracking import wandb_logger
from trainer.tracking.tracker import Tracker

AWAY = (
    wandb.errors.CommError(
        "Failed to get resume status for run a: context deadline exceeded\nwhile retrying: "
        'Post "http://127.0.0.1:9/graphql": dial tcp 127.0.0.1:9: connect: connection refused'
    ),
    # wandb_login.py raises this kind "if the server rejects the credentials or cannot be reached"
    wandb.errors.AuthenticationError("Failed to verify credentials with https://x: connection refused"),
    wandb.errors.CommError("Run initialization has timed out after 30.0 sec"),
    wandb.errors.CommError('Error uploading run: returned error 502: {"data":null}'),
    TimeoutError("the service did not answer"),
)
REFUSED = (
    wandb.errors.AuthenticationError("API key must have 40+ characters, has 3."),
    wandb.errors.UsageError("No API key configured. Use `wandb login` to log in."),
    wandb.errors.CommError("Error uploading run: returned error 401: user is not logged in"),
    wandb.errors.CommError("Error uploading run: returned error 403: permission denied"),
)


class Server:
    """Stands for `wandb.init`: what each run was told, by its id, in order."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fault: Exception | None = None
        self.told: dict[str, list[tuple[int, dict[str, Any]]]] = {}
        self.offline: list[tuple[int, dict[str, Any]]] = []

    def init(self, *, id: str, mode: str, **_: Any) -> Run:
        if mode == "offline":
            return Run(self.offline, self.folder)
        if self.fault is not None:
            raise self.fault
        return Run(self.told.setdefault(id, []), self.folder)

    @property
    def steps(self) -> list[int]:
        """Of the only run."""
        (told,) = self.told.values()
        return [step for step, _ in told]


class Run:
    def __init__(self, told: list[tuple[int, dict[str, Any]]], folder: Path) -> None:
        self.told, self.dir = told, str(folder / "wandb/offline-run-1/files")

    def log(self, values: dict[str, Any], step: int) -> None:
        self.told.append((step, values))

    def finish(self) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    server = Server(tmp_path)
    monkeypatch.setattr(wandb, "init", server.init)
    monkeypatch.setattr(wandb, "teardown", lambda: None)
    return server


def open_log(folder: Path, resumed_at: int = 0, seed: int = 0) -> Tracker:
    config = TrackingConfig(wandb=WandbConfig(project="p"))
    return Tracker.open(folder, config, title="t", recipe={"seed": seed}, resumed_at=resumed_at)


def wait_for(what: Callable[[], bool]) -> None:
    end_s = time.monotonic() + 60
    while not what():
        assert time.monotonic() < end_s
        time.sleep(0.01)


@pytest.mark.parametrize("fault", AWAY)
def test_a_server_that_is_away_is_a_warning_and_is_sent_everything_when_it_is_back(
    tmp_path: Path, server: Server, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    monkeypatch.setattr(wandb_logger, "RETRY_S", 0.01)
    server.fault = fault
    log = open_log(tmp_path)
    (said,) = [record.getMessage() for record in caplog.records]
    assert "training goes on" in said
    assert "log in" not in said
    assert "\n" not in said
    log.log(1, {"loss": 1.0})
    log.log(2, {"loss": 2.0})
    log.log_validation(2, {"validation/loss": 2.5})
    assert server.told == {}
    server.fault = None
    wait_for(lambda: server.told != {})
    log.log(3, {"loss": 3.0})
    log.close()
    assert server.steps == [1, 2, 2, 3]
    (told,) = server.told.values()
    assert {"validation/loss": 2.5} in [values for _, values in told]
    assert server.offline == []


def test_the_next_start_sends_what_the_last_one_could_not(tmp_path: Path, server: Server) -> None:
    server.fault = AWAY[0]
    first = open_log(tmp_path)
    for step in (1, 2, 3, 4):
        first.log(step, {"loss": float(step)})
    del first  # killed
    server.fault = None
    second = open_log(tmp_path, resumed_at=2)
    for step in (3, 4, 5):
        second.log(step, {"loss": float(step)})
    second.close()
    assert server.steps == [1, 2, 3, 4, 5]


def test_what_was_never_sent_is_left_for_wandb_sync(
    tmp_path: Path, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    server.fault = AWAY[0]
    log = open_log(tmp_path)
    log.log(1, {"loss": 1.0})
    log.close()
    assert server.offline == [(1, {"loss": 1.0})]
    assert f"`wandb sync {tmp_path}/wandb/offline-run-1` sends this stage" in caplog.records[-1].getMessage()


@pytest.mark.parametrize("fault", REFUSED)
def test_only_a_wrong_key_asks_to_log_in(tmp_path: Path, server: Server, fault: Exception) -> None:
    server.fault = fault
    with pytest.raises(InputError, match=r"^tracking\.wandb: .*log in with `wandb login`"):
        open_log(tmp_path)


def test_wrong_settings_are_said_without_asking_to_log_in(tmp_path: Path, server: Server) -> None:
    server.fault = wandb.errors.UsageError("Invalid project name 'a/b'")
    with pytest.raises(InputError) as caught:
        open_log(tmp_path)
    assert str(caught.value) == "tracking.wandb: Invalid project name 'a/b'"


def test_killed_before_the_first_checkpoint_no_step_stands_twice(tmp_path: Path, server: Server) -> None:
    for _ in range(2):
        log = open_log(tmp_path)
        for step in (1, 2, 3):
            log.log(step, {"loss": 1.0})
    assert server.steps == [1, 2, 3]
    log = open_log(tmp_path, seed=1)  # other numbers: another run
    log.log(1, {"loss": 7.0})
    assert [len(told) for told in server.told.values()] == [3, 1]
    assert json.loads((tmp_path / "wandb.json").read_text())["sent"] == {"metrics": 1}
