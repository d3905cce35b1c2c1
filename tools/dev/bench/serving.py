"""Servers as processes, clients that cost little, and what both take: for `tools.bench.serve`.

The server has one core and the clients another, so that neither waits for the other's; answers are counted by second of
the server's own CPU time, which other processes disturb least. The official client takes several milliseconds an answer
and would hide the server: these send prepared bytes.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from models.common.documents import parse
from models.common.errors import InputError

_START_S = 300.0
_PATH = "/v1/chat/completions"


@dataclass(frozen=True)
class Server:
    """A server that answers OpenAI's chat completions, in a process of its own."""

    process: subprocess.Popen[bytes]
    port: int

    def cpu_s(self) -> float:
        """Seconds that the process has computed."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory(self, name: str) -> int:
        """A line of the process's status in bytes: VmRSS, now, or VmHWM, the most."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))

    def forget_peak(self) -> None:
        """Count the most memory from now on."""
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    def get(self, path: str) -> tuple[int, float]:
        """Status and seconds of one GET."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=_START_S)
        started_s = time.perf_counter()
        connection.request("GET", path)
        status = connection.getresponse().status
        connection.close()
        return status, time.perf_counter() - started_s

    def answers(self, bodies: Sequence[bytes], num_clients: int) -> list[str]:
        """The answers to all bodies, in their order, by so many clients with a connection each."""
        return [text for text, _ in self.timed_answers(bodies, num_clients)]

    def timed_answers(self, bodies: Sequence[bytes], num_clients: int) -> list[tuple[str, float]]:
        """`answers`, each with the seconds that its client waited."""
        found = [("", 0.0)] * len(bodies)
        places, lock = iter(range(len(bodies))), threading.Lock()

        def client() -> None:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=_START_S)
            while True:
                with lock:
                    place = next(places, None)
                if place is None:
                    connection.close()
                    return
                started_s = time.perf_counter()
                found[place] = _answer(connection, bodies[place]), time.perf_counter() - started_s

        with ThreadPoolExecutor(num_clients) as pool:
            for done in [pool.submit(client) for _ in range(num_clients)]:
                done.result()
        return found


def _answer(connection: http.client.HTTPConnection, body: bytes) -> str:
    connection.request("POST", _PATH, body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    content = parse(response.read(), "the server's answer")
    if response.status != 200:
        raise InputError(f"the server answered {response.status}: {content}")
    return str(content["choices"][0]["message"]["content"])


@contextmanager
def serving(command: Sequence[str], port: int, cores: set[int], log: Path) -> Iterator[Server]:
    """Start a server on its cores with one thread, wait until it answers, and end it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=output,
            stderr=output,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),  # noqa: PLW1509 - no thread of ours runs yet
        )
    server = Server(process, port)
    try:
        _wait(server, log)
        yield server
    finally:
        process.terminate()
        process.wait(60)


def _wait(server: Server, log: Path) -> None:
    deadline_s = time.monotonic() + _START_S
    while time.monotonic() < deadline_s:
        if server.process.poll() is not None:
            raise InputError(f"the server ended before it answered; see {log}")
        try:
            if server.get("/health")[0] == 200:
                return
        except OSError:
            pass
        time.sleep(0.1)
    raise InputError(f"the server did not answer within {_START_S:g} s; see {log}")


def our_command(bundle: Path, port: int, *more: str) -> list[str]:
    """`sightline serve` of this checkout."""
    words = [str(bundle), "--device", "cpu", "--port", str(port), "--per-client", "64", "--timeout", "3600", *more]
    return [sys.executable, "-m", "tools.cli", "serve", *words]


def body_of(picture: bytes, kind: str, text: str, max_tokens: int, model: str) -> bytes:
    """A chat completion about one picture."""
    url = f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"
    content: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": text},
    ]
    messages = [{"role": "user", "content": content}]
    return json.dumps({"model": model, "messages": messages, "max_tokens": max_tokens, "temperature": 0}).encode()


def large_picture(width: int, height: int, *, noisy_rows: int = 0) -> bytes:
    """A picture of so many pixels that is quickly made and takes its time to decode; noise makes its file as large."""
    picture = Image.linear_gradient("L").resize((width, height)).convert("RGB")
    if noisy_rows:
        noise = random.Random(0).randbytes(3 * width * noisy_rows)
        picture.paste(Image.frombytes("RGB", (width, noisy_rows), noise), (0, 0))
    stream = io.BytesIO()
    picture.save(stream, "PNG", compress_level=1)
    return stream.getvalue()
