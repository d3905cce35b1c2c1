"""One writer: a living one keeps the directory, a dead one loses it, and one that lost it stops before it writes."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from models.common.errors import InputError
from models.common.exit_codes import ExitCode
from tests.support.paths import REPOSITORY
from trainer.distributed import run_lock
from trainer.distributed.context import DistributedContext
from trainer.distributed.run_lock import STALE_S, Holder, RunLock, take_lock

KEYS = {"token", "host", "namespace", "pid", "started", "job", "since"}


def run_program(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", program, *arguments]
    return subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)


def test_it_is_taken_once_and_given_back_once(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "new"
    lock = RunLock.acquire(run)
    assert json.loads((run / "lock.json").read_text()).keys() == KEYS
    assert [file.name for file in run.iterdir()] == ["lock.json"]
    with pytest.raises(InputError, match=rf"process {os.getpid()} on \S+ has been writing here since .*run=DIR"):
        RunLock.acquire(run)
    lock.check()
    lock.release()
    assert list(run.iterdir()) == []
    successor = RunLock.acquire(run)
    lock.release()  # does nothing, also where another has the directory by now
    assert successor.is_ours()
    successor.release()


def test_a_lock_whose_process_is_gone_is_taken_over(tmp_path: Path) -> None:
    program = "import sys; from pathlib import Path; from trainer.distributed.run_lock import RunLock; "
    done = run_program(program + "RunLock.acquire(Path(sys.argv[1]))", str(tmp_path))
    assert done.returncode == 0, done.stderr
    left_behind = json.loads((tmp_path / "lock.json").read_text())
    lock = take_lock(tmp_path, DistributedContext())
    assert lock is not None
    assert lock.replaced == Holder(**left_behind)
    assert lock.holder.token != left_behind["token"]
    lock.release()


def test_who_is_gone_is_judged_by_what_can_be_seen_of_them() -> None:
    here = Holder.this_process()
    assert not here.is_gone(1e9, here)  # a process that is seen to live, however old its lock file is
    assert replace(here, started="1").is_gone(0, here)  # its pid was used again
    elsewhere = replace(here, host="another-machine", job="17")
    assert not elsewhere.is_gone(STALE_S - 1, here)
    assert elsewhere.is_gone(STALE_S + 1, here)
    assert elsewhere.is_gone(0, replace(here, job="17"))  # the same job, requeued on another node
    assert not replace(elsewhere, job="").is_gone(0, replace(here, job=""))


def test_a_stale_lock_of_another_machine_goes_by_the_files_age(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "REFRESH_S", 0.1)
    file = tmp_path / "lock.json"
    file.write_text(json.dumps(asdict(replace(Holder.this_process(), host="another-machine"))))
    with pytest.raises(InputError, match="on another-machine has been writing here"):
        RunLock.acquire(tmp_path)
    long_ago_s = file.stat().st_mtime - STALE_S - 60
    os.utime(file, (long_ago_s, long_ago_s))
    RunLock.acquire(tmp_path).release()


def test_a_lock_that_is_refreshed_is_not_stale_however_old_a_clock_that_leapt_makes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "REFRESH_S", 1.0)
    file = tmp_path / "lock.json"
    file.write_text(json.dumps(asdict(replace(Holder.this_process(), host="another-machine"))))
    long_ago_s = file.stat().st_mtime - 10 * STALE_S
    os.utime(file, (long_ago_s, long_ago_s))
    refresher = threading.Timer(0.5, os.utime, (file, (long_ago_s + 10, long_ago_s + 10)))
    refresher.start()
    with pytest.raises(InputError, match="on another-machine has been writing here"):
        RunLock.acquire(tmp_path)
    refresher.join()
    assert [path.name for path in tmp_path.iterdir()] == ["lock.json"]


@pytest.fixture(params=[None, errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK])
def links(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system with hard links, and the ways in which others say that they have none."""
    if request.param is None:
        return

    def refuse(source: Path, target: Path) -> None:
        raise OSError(request.param, os.strerror(request.param), str(source))

    monkeypatch.setattr(os, "link", refuse)


@pytest.mark.usefixtures("links")
def test_it_is_taken_once_with_hard_links_and_without(tmp_path: Path) -> None:
    lock = RunLock.acquire(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["lock.json"]
    with pytest.raises(InputError, match="has been writing here since"):
        RunLock.acquire(tmp_path)
    lock.release()
    RunLock.acquire(tmp_path).release()
    assert list(tmp_path.iterdir()) == []


def test_a_directory_of_another_user_is_one_line(tmp_path: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can become another user")
    run = tmp_path / "run"
    run.mkdir(mode=0o755)
    for parent in (tmp_path, *list(tmp_path.parents)[:2]):
        parent.chmod(0o755)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setuid(65534)
            take_lock(run, DistributedContext())
        except InputError as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    with os.fdopen(reader, encoding="utf-8") as told:
        line = told.read()
    assert line.startswith(str(run))
    assert "Permission denied; make it readable and writable for this user, or take another directory" in line
    assert "\n" not in line


@pytest.mark.usefixtures("links")
def test_of_many_starts_at_once_one_gets_the_directory(tmp_path: Path) -> None:
    stale = replace(Holder.this_process(), started="1")
    (tmp_path / "lock.json").write_text(json.dumps(asdict(stale)))
    locks: list[RunLock] = []
    barrier = threading.Barrier(8)

    def start() -> None:
        barrier.wait()
        try:
            locks.append(RunLock.acquire(tmp_path))
        except InputError:
            return

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # A start may get it for a moment and lose it to another; then it stops before it writes (`check`).
    assert [lock.is_ours() for lock in locks].count(True) == 1
    for lock in locks:
        lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_was_taken_over_while_one_looked_is_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, here = tmp_path / "lock.json", Holder.this_process()
    stale, other = replace(here, token="stale", started="1"), replace(here, token="other")
    file.write_text(json.dumps(asdict(stale)))
    is_gone = Holder.is_gone

    def look_slowly(holder: Holder, age_s: float, seen_by: Holder) -> bool:
        answer = is_gone(holder, age_s, seen_by)
        file.write_text(json.dumps(asdict(other)))  # before this start acts on what it saw
        return answer

    monkeypatch.setattr(Holder, "is_gone", look_slowly)
    with pytest.raises(InputError, match="has been writing here"):
        RunLock.acquire(tmp_path)
    assert json.loads(file.read_text())["token"] == "other"
    assert list(tmp_path.iterdir()) == [file]


def test_a_writer_that_lost_its_lock_ends_before_it_commits(tmp_path: Path) -> None:
    program = """
import sys, pathlib
from trainer.distributed.console import set_up_logging
from trainer.distributed.run_lock import RunLock
set_up_logging()
run = pathlib.Path(sys.argv[1])
lock = RunLock.acquire(run)
file = run / "lock.json"
file.write_text(file.read_text().replace(lock.holder.token, "another"))
lock.check()
print("committed")
"""
    done = run_program(program, str(tmp_path))
    assert done.returncode == ExitCode.FENCED, done.stderr
    assert done.stdout == f"error: {tmp_path}/lock.json: another start has taken this run over; this process stops\n"


def test_a_file_system_that_does_not_answer_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lock = RunLock.acquire(tmp_path)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "read_text", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    lock.check()
    lock.release()
    assert "it stays behind, and the next start takes it over" in caplog.text


def test_what_is_no_lock_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "lock.json").write_text('{"pid": 1}')
    with pytest.raises(InputError, match="not a lock"):
        RunLock.acquire(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["lock.json"]


class Follower(DistributedContext):
    """Rank 1 of two, told by the first rank that somebody else writes here."""

    def gather(self, value: object) -> list[object]:
        return ["run: somebody writes here", value]


def test_every_rank_hears_why_the_first_could_not_take_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="somebody writes here"):
        take_lock(tmp_path, Follower(1, 2))
    assert list(tmp_path.iterdir()) == []

    def no_permission(run: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(run))

    monkeypatch.setattr(run_lock.RunLock, "acquire", no_permission)
    with pytest.raises(InputError, match=r"Permission denied; make it readable and writable"):
        take_lock(tmp_path, DistributedContext())
