"""The process that `tests.support.warm` forks commands from. Run by it as `python -m tests.support.warm_server FOLDER`.

It imports, listens, forks; it never runs a command itself, computes nothing and has one thread.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import marshal
import os
import random
import runpy
import selectors
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.support.warm import one_at_a_time

PRELOADED = (
    "torch",
    "torch._dynamo",
    "torch._inductor",
    "deepspeed",
    "deepspeed.launcher.runner",
    "transformers",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.processing_auto",
    "transformers.models.clip.modeling_clip",
    "transformers.models.clip.image_processing_pil_clip",
    "transformers.models.llama.modeling_llama",
    "transformers.models.llava.modeling_llava",
    "transformers.models.llava.processing_llava",
    "bitsandbytes",
    "peft",
    "trainer.build",
    "trainer.loop",
    "trainer.local_ranks",
    "eval.predictor",
    "eval.evaluation",
    "tools.export.merging",
)
SEEN_BY_IMPORTS = (
    "ATEN_", "BNB_", "DS_", "GOMP_", "HF_", "HOME", "KMP_", "LD_", "MKL_", "OMP_", "OPENBLAS_", "PYTHON", "TORCH_",
    "TRANSFORMERS_", "XDG_",
)  # fmt: skip
"""How variables begin that a library reads while it is imported."""
APPLIED = ("HF_HUB_OFFLINE", "PYTHONPATH", "PYTHONUNBUFFERED", "TRANSFORMERS_VERBOSITY", "TORCH_EXTENSIONS_DIR")
"""Those of them that `_apply` brings in after the fork, or that are read when they are used."""


@dataclass
class Request:
    """A command, and the file descriptors that are its input, output and errors."""

    words: list[str]
    environment: dict[str, str]
    folder: str
    files: list[int]


@dataclass
class Server:
    """Forks a process for each command, and tells the client how it ended."""

    listening: socket.socket
    selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)
    leases: set[socket.socket] = field(default_factory=set)
    clients: dict[int, socket.socket] = field(default_factory=dict)
    """By the process of the command."""

    def serve(self) -> Request | None:
        """In the server: None when nobody is left. In each process that it forks: the command to run."""
        if self.listening not in self.selector.get_map():
            self.selector.register(self.listening, selectors.EVENT_READ, self._accept)
        had_leases = False
        while self.leases or self.clients or not had_leases:
            for key, _ in self.selector.select():
                if (request := key.data(key.fileobj)) is not None:
                    return request
            had_leases = had_leases or bool(self.leases)
        return None

    def is_asked_for(self) -> bool:
        """Whether somebody has connected since `serve` returned None."""
        return bool(self.selector.select(timeout=0))

    def _accept(self, listening: socket.socket) -> Request | None:
        client, _ = listening.accept()
        head, files, _, _ = socket.recv_fds(client, 8, 3)
        if not (length := int.from_bytes(head, "big")):
            self.leases.add(client)
            self.selector.register(client, selectors.EVENT_READ, self._lease_ended)
            return None
        received = bytearray()
        while len(received) < length:
            received += client.recv(length - len(received))
        words, environment, folder = marshal.loads(bytes(received))
        request = Request(words, environment, folder, files)
        if not (pid := os.fork()):
            self._leave()
            client.close()
            return request
        for file in files:
            os.close(file)
        self.clients[pid] = client
        self.selector.register(os.pidfd_open(pid), selectors.EVENT_READ, lambda file: self._command_ended(file, pid))
        self.selector.register(client, selectors.EVENT_READ, lambda _: self._client_ended(client, pid))
        client.sendall(pid.to_bytes(8, "big"))
        return None

    def _lease_ended(self, lease: socket.socket) -> None:
        self.selector.unregister(lease)
        self.leases.discard(lease)
        lease.close()

    def _client_ended(self, client: socket.socket, pid: int) -> None:
        """A client only goes before its command where it was killed."""
        self.selector.unregister(client)
        if pid in self.clients:
            os.kill(pid, signal.SIGKILL)

    def _command_ended(self, file: int, pid: int) -> None:
        _, status = os.waitpid(pid, 0)
        self.selector.unregister(file)
        os.close(file)
        client = self.clients.pop(pid)
        if client.fileno() in self.selector.get_map():
            self.selector.unregister(client)
        with suppress(OSError):  # killed meanwhile
            client.sendall(os.waitstatus_to_exitcode(status).to_bytes(8, "big", signed=True))
        client.close()

    def _leave(self) -> None:
        """In a forked process: close what is the server's."""
        for key in list(self.selector.get_map().values()):
            if isinstance(key.fileobj, int):
                os.close(key.fileobj)
            else:
                assert isinstance(key.fileobj, socket.socket)
                key.fileobj.close()
        self.selector.close()


def become(request: Request, executable: str) -> None:
    """Run a command as `python WORDS` would have, in place of the server."""
    for place, file in enumerate(request.files):
        os.dup2(file, place)
        os.close(file)
    os.chdir(request.folder)
    _take_environment(request.environment)
    sys.executable, sys.orig_argv = executable, [executable, *request.words]
    is_unbuffered = request.words[0] == "-u"
    words = request.words[1:] if is_unbuffered else request.words
    _apply(is_unbuffered)
    main = ModuleType("__main__")
    main.__dict__["__builtins__"] = __builtins__
    sys.modules["__main__"] = main
    if words[0] == "-m":
        sys.argv, sys.path[0] = ["-m", *words[2:]], request.folder
        sys.modules.pop(words[1], None)  # runpy runs it anew, and warns where it is there
        runpy._run_module_as_main(words[1])  # type: ignore[attr-defined]
    elif words[0] == "-c":
        sys.argv, sys.path[0] = ["-c", *words[2:]], ""
        exec(compile(words[1], "<string>", "exec"), main.__dict__)
    else:
        sys.argv, sys.path[0] = words, str(Path(words[0]).resolve().parent)
        main.__file__ = words[0]
        exec(compile(Path(words[0]).read_bytes(), words[0], "exec"), main.__dict__)


def _take_environment(environment: dict[str, str]) -> None:
    ours = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ.clear()
    os.environ.update(environment)
    theirs = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    others = [place for place in sys.path[1:] if place not in ours]
    sys.path[1:] = [*(os.path.abspath(place) for place in theirs if place), *others]  # noqa: PTH100
    tempfile.tempdir = None  # found anew from the environment


def _apply(is_unbuffered: bool) -> None:
    """What a fresh interpreter and its imports would have taken from the environment or drawn from the system."""
    import huggingface_hub.constants
    import numpy as np
    from transformers.utils import logging

    is_unbuffered = is_unbuffered or bool(os.environ.get("PYTHONUNBUFFERED"))
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    for name, file in (("stdout", 1), ("stderr", 2)):
        stream: Any = open(file, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        is_by_line = file == 2 or os.isatty(file)
        stream.reconfigure(
            line_buffering=is_by_line, write_through=is_unbuffered, errors="strict" if file == 1 else "backslashreplace"
        )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    random.seed()
    np.random.seed()
    offline = os.environ.get("HF_HUB_OFFLINE", "")
    huggingface_hub.constants.HF_HUB_OFFLINE = offline.upper() in ("1", "ON", "YES", "TRUE")
    verbosity = os.environ.get("TRANSFORMERS_VERBOSITY", "")
    logging.set_verbosity(logging.log_levels.get(verbosity, logging.WARNING))


def write_facts(folder: Path, executable: str) -> None:
    """What a client compares itself with."""
    relevant = {name: value for name, value in os.environ.items() if name.startswith(SEEN_BY_IMPORTS)}
    facts = {
        "executable": executable,
        "deepspeed": str(Path(executable).with_name("deepspeed")),
        "seen_by_imports": SEEN_BY_IMPORTS,
        "applied": APPLIED,
        "environment": {name: value for name, value in relevant.items() if name not in APPLIED},
    }
    (folder / "facts").write_bytes(marshal.dumps(facts))


def main() -> None:
    """Import, serve, and in each forked process run one command."""
    folder = Path(sys.argv[1])
    write_facts(folder, sys.executable)
    for name in PRELOADED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a collection in a forked process would write to, and so copy, every page
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(folder / "socket"))
    listening.listen(64)
    server = Server(listening)
    while (request := server.serve()) is None:
        with one_at_a_time():
            if not server.is_asked_for():
                shutil.rmtree(folder)
                return
    code = exit_code(lambda: become(request, str(folder / "python")))
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as the end of an interpreter does
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)  # to take torch apart module by module costs half a second


def exit_code(run: Callable[[], None]) -> int:
    """What the interpreter would end with, having printed what it would print."""
    try:
        run()
    except SystemExit as ended:
        if ended.code is None or isinstance(ended.code, int):
            return (ended.code or 0) & 0xFF
        print(ended.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


if __name__ == "__main__":
    main()
