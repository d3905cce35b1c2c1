"""`python -m tests.support.environments [TEST ...]` (`make environments`): bundles are the same wherever they are made.

    pip                --> two environments, one of them with torchvision; the project installed in both, not editable
    trained once       --> the tiny quickstart's checkpoint
    in each environment, for a CPU with AVX512-BF16 and for one without (`tests.support.avx512_bf16`):
                           merge, NF4, int8 --> compared byte for byte with the first's
                           answers of our loader, of stock transformers and of the demo --> compared
                           the tests of bundles, or those that are named

Everything is made in `.cache/environments`, which a second run uses again. Not a part of `make test`: it takes as long.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.support.avx512_bf16 import VARIABLE
from tests.support.documents import opening_lines
from tests.support.installed import build_wheel, copy_sources, install
from tests.support.pages import answer_of_page
from tests.support.paths import REPOSITORY
from tests.support.quickstart import TINY

FOLDER = REPOSITORY / ".cache" / "environments"
NAMES, FLAGS = ("plain", "torchvision"), ("off", "on")
TESTS = (
    "tests/models/test_nf4.py",
    "tests/models/test_torchvision.py",
    "tests/tools/export",
    "tests/tools/serve/test_page.py",
    "tests/eval/test_predictor.py",
)
SIZES = TINY.model_copy(
    update={
        "clip_steps": 30,
        "language_steps": 100,
        "overrides": (
            "stages.align.duration={unit: steps, count: 30}",
            "stages.lora.duration={unit: steps, count: 200}",
            "tracking.log_every_steps=50",
        ),
    }
)
"""Trained until it answers in words: a model of three steps ends each answer at once."""
TRAIN = """
import sys
from pathlib import Path
from tools.examples.quickstart.runner import Runner
from tools.examples.quickstart.steps import QuickstartSizes, plan
Path("quickstart").mkdir(exist_ok=True)
steps = plan(Path("quickstart"), QuickstartSizes.model_validate_json(sys.argv[1]), 0)
names = ("world", "clip", "language", "shards align", "shards lora", "align", "lora")
Runner(Path("quickstart"), [step for step in steps if step.name in names]).run()
"""
BUNDLES = ("quickstart/merged/lora", "quickstart/bundle", "quickstart/int8")
OURS = """
import json, sys
from models.common.errors import run_cli
from tools.export.merge import main as merge
from tools.export.quantize import main as quantize
import sightline
photo, question, merged, nf4, int8 = sys.argv[1:]
assert run_cli(merge, ["quickstart", merged, "--stage", "lora"]) == 0
for out, target in ((nf4, "nf4"), (int8, "int8")):
    assert run_cli(quantize, [merged, out, "--to", target, "--force"]) == 0
models = [sightline.load(path, device="cpu") for path in (merged, nf4, int8)]
print(json.dumps([model.chat(photo, question, max_new_tokens=64) for model in models]))
"""
STOCK = """
import runpy, sys
photo, question, *bundles = sys.argv[1:]
for bundle in bundles:
    sys.argv = ["open.py", bundle, photo, question]
    runpy.run_path("open.py")
"""
OPERATORS = """\
import torch as _torch
_declared = _torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    _declared.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
"""In front of a torchvision that was built for another torch: its operators are declared, and what needs none of them
works, as transformers' image processors do."""


@dataclass(frozen=True)
class Environment:
    """An environment with the project installed, and whether its CPU is taken for one with AVX512-BF16."""

    name: str
    flag: str = "off"

    @property
    def folder(self) -> Path:
        """Its directory."""
        return FOLDER / self.name

    @property
    def python(self) -> str:
        """Its interpreter."""
        return str(self.folder / "bin" / "python")

    @property
    def variables(self) -> dict[str, str]:
        """Those of its processes."""
        return {
            **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            VARIABLE: self.flag,
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "TORCH_EXTENSIONS_DIR": str(FOLDER / "torch_extensions"),
        }

    def run(self, *words: str, where: Path, **variables: str) -> str:
        """What its Python prints; SystemExit with the end of its output where it fails."""
        command, variables = [self.python, *words], self.variables | variables
        done = subprocess.run(command, cwd=where, env=variables, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{self}: {' '.join(words)[:200]}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
        return done.stdout


def make(environment: Environment) -> None:
    """By pip, unless it is there; the project is installed anew each time."""
    folder, ready, python = environment.folder, environment.folder / ".ready", environment.python
    if not ready.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        more = ["torchvision"] if environment.name == "torchvision" else []
        with TemporaryDirectory() as temporary:
            words = ["install", "--quiet", "--constraint", str(REPOSITORY / "constraints.txt")]
            words += [f"{copy_sources(Path(temporary) / 'source')}[dev]", *more]
            subprocess.run([python, "-m", "pip", *words], check=True)
        ready.touch()
    with TemporaryDirectory() as temporary:
        install(python, build_wheel(Path(temporary)))
    (site,) = folder.glob("lib/python*/site-packages")
    shutil.copyfile(Path(__file__).with_name("avx512_bf16.py"), site / "tests_avx512_bf16.py")
    line = f"import os; os.environ.get({VARIABLE!r}) and __import__('tests_avx512_bf16')\n"
    (site / "tests_avx512_bf16.pth").write_text(line)
    package, importing = site / "torchvision" / "__init__.py", [python, "-c", "import torchvision"]
    if package.exists() and subprocess.run(importing, check=False, stderr=subprocess.DEVNULL).returncode:
        package.write_text(OPERATORS + package.read_text())
        environment.run("-c", "import torchvision", where=folder)
        print("torchvision was built for another torch: its operators are declared and cannot be used", flush=True)


def trained() -> Path:
    """The tiny quickstart after its last stage, trained once by the first environment: a checkout's own command."""
    where = FOLDER / "trained"
    where.mkdir(exist_ok=True)
    print(f"trains the tiny quickstart in {where} (about 2 minutes, once)", flush=True)
    if not (where / "quickstart" / "lora" / "finished.json").is_file():
        Environment(NAMES[0]).run("-c", TRAIN, SIZES.model_dump_json(), where=where, PYTHONPATH=str(REPOSITORY))
    return where / "quickstart"


@dataclass(frozen=True)
class Made:
    """What one environment has made: files by their names, reports, and answers by who gave them."""

    files: dict[str, bytes]
    reports: dict[str, Any]
    answers: dict[str, Any]


def chain(environment: Environment, source: Path) -> Made:
    """Merge, quantize and ask in a directory of its own; stock transformers and the demo in processes of their own."""
    where = FOLDER / f"{environment.name}_{environment.flag}"
    shutil.rmtree(where, ignore_errors=True)
    shutil.copytree(source, where / "quickstart", ignore=shutil.ignore_patterns("merged", "bundle", "eval"))
    world = where / "quickstart" / "world" / "held_out"
    question = json.loads((world / "questions.json").read_text())["questions"][0]["question"]
    photo = min((world / "images").iterdir())
    asked = [str(photo.relative_to(where)), question, *BUNDLES]
    (where / "open.py").write_text(opening_lines())
    page = [environment.python, "-m", "tools.demo", BUNDLES[1], "--device", "cpu"]
    answers = {
        "ours": environment.run("-c", OURS, *asked, where=where).splitlines()[-1],
        "stock": environment.run("-I", "-c", STOCK, *asked, where=where),
        "page": answer_of_page(page, photo, question, where=where, variables=environment.variables),
    }
    silent = [name for name, text in answers.items() if not text.strip('[]", \n')]
    if silent:
        raise SystemExit(f"no word in the answers of {', '.join(silent)}: {answers}")
    files, reports = {}, {}
    for bundle in BUNDLES:
        for file in sorted((where / bundle).iterdir()):
            files[f"{bundle}/{file.name}"] = file.read_bytes()
        reports[bundle] = json.loads(files.pop(f"{bundle}/sightline.json"))
    return Made(files, reports, answers)


def other_pixels(report: dict[str, Any]) -> str:
    """Take out of a report what torchvision may change, and say it: the check of its pixels, and with it the digest of
    the source's report."""
    report["parents"].pop("bundle_manifest", None)
    checks = report["parity"]["checks"]
    (check,) = [check for check in checks if "torchvision" in check["name"]]
    checks.remove(check)
    return f"{check['name']}: {check['note'] or check['value']}"


def compare(source: Path) -> list[str]:
    """Run the chain everywhere, and say what differs from the first."""
    first: dict[str, Made] = {}
    differing: list[str] = []
    for flag in FLAGS:
        for name in NAMES:
            environment = Environment(name, flag)
            made = chain(environment, source)
            said = [other_pixels(report) for report in made.reports.values()]
            print(f"{name}, {VARIABLE}={flag}: {len(made.files)} files of {sum(map(len, made.files.values())):,} bytes")
            print(f"  {said[0]}\n  {made.answers}", flush=True)
            bundles, answers = first.setdefault("bundles", made), first.setdefault(flag, made).answers
            found = [key for key in bundles.files if bundles.files[key] != made.files.get(key)]
            found += [f"{key}/sightline.json" for key in bundles.reports if bundles.reports[key] != made.reports[key]]
            found += [f"answers of {key}" for key in answers if answers[key] != made.answers[key]]
            differing += [f"{name}, {flag}: {each}" for each in found]
    return differing


def main(tests: list[str]) -> int:
    """Make both environments, compare what they make, run the tests in them; returns 0 where all is the same."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        make(Environment(name))
    differing = compare(trained())
    print("\n".join(differing) or "bundles, reports and answers are the same", flush=True)
    for flag in FLAGS:
        for name in NAMES:
            print(f"{name}, {VARIABLE}={flag}: the tests of bundles (about 7 minutes)", flush=True)
            words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *(tests or TESTS)]
            print(f"{name}, {flag}:", Environment(name, flag).run(*words, where=REPOSITORY)[-500:], flush=True)
    return int(bool(differing))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
