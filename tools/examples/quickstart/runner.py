"""Runs steps two cores at a time, shows what they print, and remembers what is done.

A step is done if RUN/steps.json has a record of the same command after the same earlier commands, and its results
exist. So a second run reuses everything and an interrupted one resumes; training steps also resume from their own
checkpoints.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from models.common.documents import read_value
from models.common.errors import InputError
from models.common.files import write_json
from tools.examples.quickstart.steps import Step, with_free_port

ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",  # equal results on every machine: one thread per process, on the CPU
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
}
NOISE = re.compile(r"\[INFO\]|\[WARNING\]|FutureWarning|return func\(\*args|Loading weights|Writing model shards|^\s*$")
REDRAWN_EVERY_S = 5.0


class Runner:
    """Runs a plan in `run`. `seconds` says how long each step took, in this run or an earlier one."""

    def __init__(self, run: Path, steps: Sequence[Step], num_cores: int = 2) -> None:
        self._file = run / "steps.json"
        self._steps = {step.name: step for step in steps}
        self._records: dict[str, Any] = read_value(self._file) if self._file.is_file() else {}
        self._keys: dict[str, str] = {}
        for step in steps:
            self._keys[step.name] = self._key(step)
        self._free_cores = num_cores
        self._state = threading.Condition()
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._failed: list[str] = []
        self._stopping = False
        self._started_s = time.monotonic()
        self.done_before = {step.name for step in steps if self._is_done(step)}

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each step that is done."""
        records = {name: self._records[name] for name in self._steps if name in self._records}
        return {name: record["seconds"] for name, record in records.items() if record["seconds"] is not None}

    def run(self) -> None:
        """Run every step that is not done; raises InputError naming the step that failed, after stopping the others."""
        done = set(self.done_before)
        for name in (name for name in self._steps if name in done):
            self._say(name, f"done before, in {self._records[name]['seconds']:.0f} s")
        # Not Thread.join: interrupted by Ctrl-C it takes a thread for ended (threading.py, _wait_for_tstate_lock).
        with ThreadPoolExecutor(max_workers=len(self._steps)) as threads:
            try:
                wait(futures := self._start_as_cores_come_free(done, threads))
            finally:  # also on Ctrl-C: our commands must not outlive this process
                self._stop_all()
        for future in futures:
            future.result()  # raises what the thread raised
        if self._failed:
            raise InputError(f"{self._failed[0]}; fix it and run the same command again, which resumes here")

    def _start_as_cores_come_free(self, done: set[str], threads: ThreadPoolExecutor) -> list[Future[None]]:
        waiting, futures = [step for step in self._steps.values() if step.name not in done], []
        with self._state:
            while waiting and not self._failed:
                step = next((step for step in waiting if self._may_start(step, done)), None)
                if step is None:
                    self._state.wait()
                    continue
                waiting.remove(step)
                self._free_cores -= step.cores
                futures.append(threads.submit(self._run_step, step, done))
        return futures

    def _may_start(self, step: Step, done: set[str]) -> bool:
        return step.cores <= self._free_cores and all(need in done for need in step.needs)

    def _run_step(self, step: Step, done: set[str]) -> None:
        try:
            self._complete(step, done)
        except OSError as error:  # no such program, a full disk
            self._fail(step, str(error))
        except BaseException as error:
            self._fail(step, type(error).__name__)
            raise

    def _complete(self, step: Step, done: set[str]) -> None:
        self._begin(step)
        command = with_free_port(step.command)
        self._say(step.name, "$ " + shlex.join(_shown(command)))
        started_s = time.monotonic()
        status = self._execute(step.name, command)
        with self._state:
            self._running.pop(step.name, None)
            self._free_cores += step.cores
            missing = [str(path) for path in step.makes if not path.exists()]
            if status != 0 or missing:
                self._fail(step, f"exit code {status}" if status else f"it did not make {', '.join(missing)}")
            else:
                seconds = round(time.monotonic() - started_s, 1)
                self._records[step.name] = {"key": self._keys[step.name], "seconds": seconds}
                write_json(self._file, self._records)
                done.add(step.name)
                self._say(step.name, f"done in {seconds:.0f} s")
            self._state.notify_all()

    def _fail(self, step: Step, reason: str) -> None:
        """Stop the others, and tell who waits for this step that nobody works on it any more."""
        with self._state:
            self._failed.append(f"step {step.name!r} failed: {reason}")
            self._stop_all()
            self._state.notify_all()

    def _begin(self, step: Step) -> None:
        """Record the command; results of another command for this step, complete or not, are removed."""
        with self._state:
            before = self._records.get(step.name)
            if before is not None and before["key"] != self._keys[step.name]:
                for path in step.owns or step.makes:
                    if path.is_dir():
                        shutil.rmtree(path)
                    else:
                        path.unlink(missing_ok=True)
            self._records[step.name] = {"key": self._keys[step.name], "seconds": None}
            write_json(self._file, self._records)

    def _execute(self, name: str, command: Sequence[str]) -> int:
        environment = {**os.environ, **ENVIRONMENT}
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        with self._state:
            self._running[name] = process
        if self._stopping:
            self._stop_all()
        assert process.stdout is not None
        self._relay(name, io.TextIOWrapper(process.stdout, errors="replace", newline=""))
        return process.wait()

    def _relay(self, name: str, stream: Any) -> None:
        """Print the lines of a command under its name; of a progress line, one state every few seconds."""
        shown_s = 0.0
        pending = ""
        while chunk := stream.read(1):
            if chunk not in "\r\n":
                pending += chunk
                continue
            redrawn = chunk == "\r"
            if not NOISE.search(pending) and not (redrawn and time.monotonic() - shown_s < REDRAWN_EVERY_S):
                self._say(name, pending.replace("\x1b[K", ""))
                shown_s = time.monotonic() if redrawn else shown_s
            pending = ""

    def _stop_all(self) -> None:
        self._stopping = True
        with self._state:
            for process in self._running.values():
                try:
                    os.killpg(process.pid, 15)
                except ProcessLookupError:
                    continue

    def _say(self, name: str, text: str) -> None:
        print(f"[{time.monotonic() - self._started_s:5.0f} s] {name:12s} | {text}", flush=True)

    def _is_done(self, step: Step) -> bool:
        record = self._records.get(step.name)
        if record is None or record["seconds"] is None or record["key"] != self._keys[step.name]:
            return False
        return all(path.exists() for path in step.makes)

    def _key(self, step: Step) -> str:
        text = json.dumps([step.command[1:], [self._keys[need] for need in step.needs]])
        return hashlib.sha256(text.encode()).hexdigest()


def _shown(command: Sequence[str]) -> list[str]:
    """A command as the user would type it: no absolute path to the interpreter."""
    return [Path(command[0]).name.split("3")[0], *command[1:]]
