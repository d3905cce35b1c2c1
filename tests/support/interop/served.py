"""`transformers serve`, asked over HTTP as a client of OpenAI's API asks."""

from __future__ import annotations

import base64
import json
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from tests.support.interop.environments import FOLDER, Program
from tests.support.patience import GUARD_S


def ask_served(program: Program, directory: Path, rows: list[dict[str, str]], tokens: int) -> list[str] | str:
    """The answers of a server of one model, one request after another; or what it said last."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    words = ["serve", str(directory), "--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
    log = FOLDER / "asked" / program.name / "serve.txt"
    with log.open("w") as heard:
        command = [str(program.folder / "bin" / "transformers"), *words]
        server = subprocess.Popen(command, env=program.variables, stdout=heard, stderr=heard)
        try:
            base = f"http://127.0.0.1:{port}"
            _wait(server, f"{base}/health")
            return [_asked(base, str(directory), row, tokens) for row in rows]
        except (OSError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}; {log.read_text()[-300:]}"
        finally:
            server.terminate()
            server.wait()


def _wait(server: subprocess.Popen[bytes], address: str) -> None:
    end = time.monotonic() + GUARD_S
    while True:
        if server.poll() is not None or time.monotonic() > end:
            raise RuntimeError("transformers serve did not begin to listen")
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.2)


def _asked(base: str, model: str, row: dict[str, str], tokens: int) -> str:
    address = "data:image/png;base64," + base64.b64encode(Path(row["image"]).read_bytes()).decode()
    content = [{"type": "image_url", "image_url": {"url": address}}, {"type": "text", "text": row["question"]}]
    body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": content}]}
    body |= {"max_tokens": tokens, "temperature": 0.0, "stream": False}
    request = urllib.request.Request(
        f"{base}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=GUARD_S) as answer:
        return json.loads(answer.read())["choices"][0]["message"]["content"]
