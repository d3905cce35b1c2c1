"""The program that `tests.support.warm` lays down as `python` and `deepspeed`: hands a command to the server.

It runs without site-packages (`-IS`) and imports only what starts within milliseconds.
"""

import marshal
import os
import signal
import socket
import sys

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT)


def run(folder: str, words: list[str]) -> int:
    """The exit code of a command, negative for a signal; or never, where this became the real interpreter."""
    with open(os.path.join(folder, "facts"), "rb") as file:  # noqa: PTH118, PTH123 - pathlib takes 10 ms to import
        facts = marshal.load(file)
    if os.path.basename(sys.argv[0]) == "deepspeed":  # noqa: PTH119
        words = [facts["deepspeed"], "--master_port", free_port(), *words]
    relevant = {name: value for name, value in os.environ.items() if name.startswith(facts["seen_by_imports"])}
    for name in facts["applied"]:
        relevant.pop(name, None)
    if relevant != facts["environment"] or not is_known(words):
        os.execv(facts["executable"], [facts["executable"], *words])
    server = socket.socket(socket.AF_UNIX)
    server.connect(os.path.join(folder, "socket"))  # noqa: PTH118
    request = marshal.dumps((words, dict(os.environ), os.getcwd()))  # noqa: PTH109
    socket.send_fds(server, [len(request).to_bytes(8, "big")], [0, 1, 2])
    server.sendall(request)
    pid = read_number(server)
    for number in FORWARDED:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, _: os.kill(pid, number))
    return read_number(server)


def free_port() -> str:
    """In place of the launcher's default, which another run on this machine may have."""
    with socket.socket() as tried:
        tried.bind(("127.0.0.1", 0))
        return str(tried.getsockname()[1])


def is_known(words: list[str]) -> bool:
    """`[-u] -m MODULE`, `[-u] -c CODE` or `[-u] FILE.py`; all else is for the real interpreter."""
    rest = words[1:] if words[:1] == ["-u"] else words
    if rest[:1] in (["-m"], ["-c"]):
        return len(rest) > 1 and "multiprocessing" not in rest[1] and rest[1] not in ("pip", "venv", "pytest")
    return bool(rest) and not rest[0].startswith("-")


def read_number(server: socket.socket) -> int:
    received = b""
    while len(received) < 8:
        part = server.recv(8 - len(received))
        if not part:
            sys.exit("the warm interpreter has gone")
        received += part
    return int.from_bytes(received, "big", signed=True)


if __name__ == "__main__":
    code = run(os.path.dirname(os.path.abspath(sys.argv[0])), sys.argv[1:])  # noqa: PTH100, PTH120
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)
