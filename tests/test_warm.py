"""`tests.support.warm`: a command that is forked is, to who starts it, a command that was started."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import warm
from tests.support.patience import GUARD_S, wait_until

SHOWN = "import json, os, sys; print(json.dumps([sys.argv, os.getcwd(), os.environ.get('GIVEN'), __name__]))"
IS_WARM = "import sys; print('deepspeed' in sys.modules)"
WAITS = "import os, sys, time; print(os.getpid(), flush=True); time.sleep(3600)"


def run(*words: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **variables}
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["code", "script", "module"])
def test_words_folder_environment_and_outputs_are_those_of_a_fresh_interpreter(tmp_path: Path, kind: str) -> None:
    (tmp_path / "shown.py").write_text(f"{SHOWN}\nsys.exit('ended')\n")
    words = {"code": ["-c", SHOWN, "one"], "script": ["shown.py", "one"], "module": ["-m", "shown", "one"]}[kind]
    fresh, forked = (run(python, *words, folder=tmp_path, GIVEN="it") for python in (sys.executable, warm.python()))
    assert json.loads(forked.stdout)[2] == "it"
    assert (forked.returncode, forked.stdout, forked.stderr) == (fresh.returncode, fresh.stdout, fresh.stderr)


@pytest.mark.slow
def test_an_error_and_a_signal_end_it_as_they_do(tmp_path: Path) -> None:
    failed = run(
        warm.python(), "-c", "import sys; sys.stderr.write('told\\n'); raise KeyError('gone')", folder=tmp_path
    )
    assert failed.returncode == 1
    assert failed.stderr.startswith("told\nTraceback")
    assert failed.stderr.endswith("KeyError: 'gone'\n")
    for number in (signal.SIGKILL, signal.SIGTERM):
        assert (
            run(warm.python(), "-c", f"import os; os.kill(os.getpid(), {number:d})", folder=tmp_path).returncode
            == -number
        )


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_who_ends_the_client_ends_the_command(tmp_path: Path, number: signal.Signals) -> None:
    client = subprocess.Popen([warm.python(), "-c", WAITS], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert client.stdout is not None
    pid = int(client.stdout.readline())
    client.send_signal(number)
    assert client.wait(GUARD_S) == -number
    wait_until("the command has ended", lambda: not Path(f"/proc/{pid}").exists())


@pytest.mark.slow
def test_it_is_forked_only_where_imports_would_have_seen_the_same(tmp_path: Path) -> None:
    assert run(warm.python(), "-c", IS_WARM, folder=tmp_path).stdout == "True\n"
    assert run(warm.python(), "-c", IS_WARM, folder=tmp_path, OMP_NUM_THREADS="2").stdout == "False\n"
    assert run(warm.python(), "-I", "-c", IS_WARM, folder=tmp_path).stdout == "False\n"
    inner = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {IS_WARM!r}])"
    assert run(warm.python(), "-c", inner, folder=tmp_path).stdout == "True\n"
