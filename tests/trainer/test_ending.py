"""After an error the message comes first, and what follows cannot keep the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

from models.common.errors import AwayError, InputError
from models.common.exit_codes import ExitCode
from tests.support.paths import REPOSITORY
from trainer.ending import exit_code_of, limited_teardown, line_of, say_now

STUCK = """
import sys, threading, trainer.main as main
class Start:
    def __init__(self, *_): pass
    def open(self): return self
    def close(self): print("teardown", file=sys.stderr, flush=True)
    def linger(self): pass
    def phase(self): raise {error}
main.Start = Start
import trainer.ending
main.limited_teardown = lambda code: trainer.ending.limited_teardown(code, 0.5)
main._leave_distributed = lambda: threading.Event().wait()  # NCCL's destroy, whose peers stand in a collective
from models.common.errors import InputError, run_cli
raise SystemExit(run_cli(main.main, ["recipe.yaml", "--stage", "align"]))
"""


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [("InputError('x: mend it')", 2, "error: x: mend it"), ("ValueError('a bug')", 1, "ValueError: a bug")],
)
def test_the_message_stands_before_a_teardown_that_never_ends(error: str, code: int, said: str) -> None:
    program = STUCK.format(error=error).replace(
        "import sys,", "from models.common.errors import InputError\nimport sys,"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert done.stderr.index(said) < done.stderr.index("teardown")
    assert done.stderr.count(said) == 1


def test_codes_and_lines_of_errors() -> None:
    assert exit_code_of(InputError("x")) == 2
    assert exit_code_of(AwayError("x")) == ExitCode.REQUEUE
    assert exit_code_of(OSError(28, "No space left on device", "f")) == 2
    assert exit_code_of(OSError(2, "No such file", "f")) == 1
    assert exit_code_of(SystemExit(77)) == 77
    assert exit_code_of(KeyboardInterrupt()) == ExitCode.KEYBOARD
    assert exit_code_of(ValueError("x")) == 1
    assert line_of(ValueError("a\nb")) == "ValueError: a b"
    assert line_of(InputError("x: mend it")) == "x: mend it"


def test_an_error_is_said_once_and_a_block_in_time_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    error = InputError("x: mend it")
    say_now(error)
    say_now(error)
    say_now(SystemExit(3))
    assert capsys.readouterr().err == "error: x: mend it\n"
    with limited_teardown(1, 3600.0):
        pass
