"""The whole chain by its real commands, very small: what it leaves, that it goes on, and what the README says."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from models.common.errors import InputError
from tests.support import warm
from tests.support.paths import REPOSITORY
from tests.support.patience import GUARD_S, wait_until
from tests.support.quickstart import TINY
from tools.examples.quickstart.runner import Runner
from tools.examples.quickstart.steps import Step, launcher, plan, recipe_arguments, with_free_port

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def commands(language: str) -> list[str]:
    blocks = re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


@pytest.mark.slow
def test_it_leaves_a_report_of_four_stages_and_a_bundle(quickstart_run: Path) -> None:
    report = json.loads((quickstart_run / "report.json").read_text())
    assert set(report) == {"seconds", "stages"}
    assert list(report["stages"]) == ["before", "align", "lora", "nf4"]
    for figures in report["stages"].values():
        assert set(figures) == {"vqa_accuracy", "vqa_accuracy_shuffled", "cider", "cider_shuffled"}
        assert 0 <= figures["vqa_accuracy"] <= 100
    assert report["seconds"]["total"] > 0
    assert "<svg" in (quickstart_run / "report.html").read_text()
    printed = (quickstart_run / "stdout.txt").read_text()
    assert f"bundle  {quickstart_run / 'bundle'}" in printed
    assert "sightline demo" in printed


@pytest.mark.slow
def test_a_second_run_reuses_everything(quickstart_run: Path) -> None:
    bundle = (quickstart_run / "bundle" / "sightline.json").stat().st_mtime_ns
    command = [warm.python(), "-m", "tools.quickstart", "--run", str(quickstart_run), "--sizes", TINY.model_dump_json()]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert "$ " not in done.stdout
    assert done.stdout.count("done before") >= len(plan(quickstart_run, TINY, 0))
    assert (quickstart_run / "bundle" / "sightline.json").stat().st_mtime_ns == bundle


@pytest.mark.slow
def test_every_python_line_of_the_readme_runs(quickstart_run: Path) -> None:
    script = "\n".join(commands("python")).replace("runs/quickstart", str(quickstart_run))
    done = subprocess.run([warm.python(), "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\n")  # three steps of training may well answer with nothing


def readme_tools() -> list[str]:
    wanted = (
        "python -m tools.merge",
        "python -m tools.quantize",
        "python -m eval.run",
        "python -m tools.shards",
        "deepspeed",
    )
    return [line for line in commands("bash") if line.startswith(wanted)]


@pytest.mark.slow
@pytest.mark.parametrize("line", readme_tools())
def test_every_command_of_the_readme_runs(quickstart_run: Path, tmp_path: Path, line: str) -> None:
    """On the tiny run, whose sizes are overrides; what is made anew goes elsewhere. deepspeed finds stages finished."""
    text = line.replace("data/mine", str(tmp_path / "mine"))
    text = re.sub(r"--out \S*/(\S+)", rf"--out {tmp_path}/\1", text.replace("runs/quickstart", str(quickstart_run)))
    words = shlex.split(text)
    words += ["--force"] if "tools.quantize" in line else []
    words += recipe_arguments(quickstart_run, TINY, 0)[1:] if words[0] == "deepspeed" else []
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PATH": f"{Path(warm.python()).parent}:{os.environ['PATH']}"}
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    if words[0] == "deepspeed":
        assert "finished already" in done.stdout


def test_every_readme_command_is_known() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    for line in commands("bash"):
        words = shlex.split(line)
        match words[0]:
            case "make":
                assert f"\n{words[1]}:" in makefile
            case "sbatch":
                assert (REPOSITORY / words[1]).is_file()
                assert (REPOSITORY / words[2]).is_file()
            case "sightline":
                from tools.cli import VERBS

                assert words[1] in VERBS
            case "python" | "deepspeed":
                assert line in readme_tools()
            case other:
                raise AssertionError(f"a command that no test knows: {other}")


def test_the_readmes_tree_names_what_is_there() -> None:
    tree = re.search(r"```text\n(trainer/.*?)```", README, flags=re.DOTALL)
    assert tree is not None
    for line in tree[1].splitlines():
        name = line.split()[0]
        place = REPOSITORY / ("trainer" if line.startswith("  ") else ".") / name
        assert place.exists(), name


def step(name: str, command: str, folder: Path, *needs: str) -> Step:
    return Step(name, ("/bin/sh", "-c", command), (folder / name,), needs)


def test_a_failing_step_is_named_and_the_next_run_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = [
        step("first", f"echo once >> {tmp_path}/log; touch {tmp_path}/first", tmp_path),
        step("second", f"test -e {tmp_path}/mended && touch {tmp_path}/second", tmp_path, "first"),
        step("third", f"touch {tmp_path}/third", tmp_path, "second"),
    ]
    with pytest.raises(InputError, match="step 'second' failed: exit code 1"):
        Runner(tmp_path, steps).run()
    assert not (tmp_path / "third").exists()
    (tmp_path / "mended").touch()
    Runner(tmp_path, steps).run()
    assert (tmp_path / "third").exists()
    assert (tmp_path / "log").read_text() == "once\n"
    assert "first        | done before" in capsys.readouterr().out


def test_another_command_makes_its_step_and_those_behind_it_run_again(tmp_path: Path) -> None:
    def steps(word: str) -> list[Step]:
        return [
            step("first", f"echo {word} > {tmp_path}/first", tmp_path),
            step("second", f"cp {tmp_path}/first {tmp_path}/second", tmp_path, "first"),
        ]

    Runner(tmp_path, steps("one")).run()
    Runner(tmp_path, steps("two")).run()
    assert (tmp_path / "second").read_text() == "two\n"


def test_what_another_command_began_is_cleared_and_what_the_same_one_began_is_not(tmp_path: Path) -> None:
    def broken_off(word: str) -> Step:
        command = f"mkdir -p {tmp_path}/d; ls {tmp_path}/d > {tmp_path}/seen; touch {tmp_path}/d/{word}; exit 1"
        return Step("train", ("/bin/sh", "-c", command), (tmp_path / "d" / "finished",), owns=(tmp_path / "d",))

    for word, seen in (("one", ""), ("one", "one\n"), ("two", "")):
        with pytest.raises(InputError):
            Runner(tmp_path, [broken_off(word)]).run()
        assert (tmp_path / "seen").read_text() == seen


def test_the_keyboard_ends_what_runs_and_the_next_run_goes_on(tmp_path: Path) -> None:
    """Ctrl-C in a real process: the step's own child must be gone with it."""
    script = f"""
import signal
from pathlib import Path
from tools.examples.quickstart.runner import Runner
from tools.examples.quickstart.steps import Step
signal.signal(signal.SIGINT, signal.default_int_handler)  # where the tests run in the background it is ignored
folder = Path({str(tmp_path)!r})
command = ("/bin/sh", "-c", f"echo $$ > {{folder}}/pid; sleep 86400; touch {{folder}}/made")
Runner(folder, [Step("long", command, (folder / "made",))]).run()
"""
    process = subprocess.Popen([sys.executable, "-c", script], cwd=REPOSITORY, stderr=subprocess.DEVNULL)
    pid = tmp_path / "pid"
    wait_until("the step has begun", lambda: pid.exists() and pid.read_text().strip())
    child = int((tmp_path / "pid").read_text())
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=GUARD_S) != 0
    assert not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2]
    assert not (tmp_path / "made").exists()


def test_a_step_that_does_not_make_its_output_fails(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="it did not make"):
        Runner(tmp_path, [step("first", "true", tmp_path)]).run()


def test_a_step_whose_program_is_missing_fails_and_nobody_waits_for_it(tmp_path: Path) -> None:
    steps = [
        Step("first", ("/no/such/program",), (tmp_path / "first",)),
        step("second", f"touch {tmp_path}/second", tmp_path, "first"),
    ]
    with pytest.raises(InputError, match=r"step 'first' failed: .*No such file or directory: '/no/such/program'"):
        Runner(tmp_path, steps).run()


def test_two_runs_on_a_machine_do_not_meet_at_one_port() -> None:
    command = ("python", "-m", "around", *launcher(), "recipe.yaml")
    first, second = with_free_port(command), with_free_port(command)
    place = first.index("--master_port")
    assert first[place - 1] == command[3]
    assert first[:place] + first[place + 2 :] == command
    assert first[place + 1] != second[place + 1]
    assert with_free_port(("sh", "-c", "true")) == ("sh", "-c", "true")
