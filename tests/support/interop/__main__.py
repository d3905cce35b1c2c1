"""`python -m tests.support.interop [PROGRAM ...]` (`make interop`): our exports in other programs, string by string.

    tiny models of each family --sightline export--> every format --> 72 questions asked of sightline.load
    uv --> an environment for each program --> the same asked there --> family, format, program: 72, or a refusal

Everything is made in `build/interop`, which a second run uses again; `rm -rf build/interop` begins anew. It needs PyPI,
and for vLLM a wheel of torch for CPUs (PIP_FIND_LINKS or UV_EXTRA_INDEX_URL). Not a part of `make test`. It returns 1
where an answer differs, or where a program opens what is documented as refused.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.interop import models
from tests.support.interop.environments import FOLDER, PROGRAMS, Program, make
from tests.support.interop.served import ask_served

TOKENS = 8
MODES = {
    "with_transformers.py": ("single", "batch", "pipeline"),
    "with_vllm.py": ("engine",),
    "with_lmms_eval.py": ("llava_hf",),
}
WHOLE = ("clip", "siglip")
"""Families that are asked in every format; the others as `stock` alone."""
STOCK_ALONE = ("transformers 4.57", "lmms-eval")
REFUSALS = {
    ("vLLM", "dinov2", "stock"): "unsupported vision config",
    ("vLLM", "vit", "stock"): "unsupported vision config",
    ("vLLM", "internvit", "stock"): "unsupported vision config",
    ("transformers 4.57", "internvit", "stock"): "missing `**kwargs` in the signature",
    ("vLLM", "clip", "w8a16"): "not supported by cpuwna16",
    ("vLLM", "siglip", "w8a16"): "not supported by cpuwna16",
}
"""(program, family, format) -> a piece of what the program says, which docs/bundle.md repeats."""
LEAST = {("vLLM", "w4a16"): 0.4, ("llama.cpp", "gguf"): 0.95, ("lmms-eval", "stock"): 0.95}
"""(program, format) -> the share of equal answers that is asked for, elsewhere all. Answers of random weights have near
ties everywhere: vLLM computes packed weights on a CPU in bf16 alone (50 of 72 on one CPU, 33 on one with AMX),
llama.cpp keeps keys and values in fp16, lmms-eval asks for no backend and gets torchvision's pixels where a picture
is resized (DINOv2: 48 to 42)."""


@dataclass(frozen=True)
class Job:
    """A directory that a program is asked to open, the bundle whose answers are expected, and a refusal that is."""

    family: str
    format: str
    directory: Path
    expected: Path
    adapter: Path | None = None
    refusal: str = ""

    @property
    def name(self) -> str:
        """Of the job in the asker's files."""
        return f"{self.family} {self.format}"


def jobs_of(program: Program, made: dict[str, dict[str, Path | str]]) -> Iterator[Job]:
    """What a program is asked to open."""
    for family, formats in made.items():
        bundle = formats["bundle"]
        assert isinstance(bundle, Path)
        for name, directory in formats.items():
            if name in ("bundle", "gguf") or isinstance(directory, str):
                continue
            if name != "stock" and (family not in WHOLE or program.name in STOCK_ALONE):
                continue
            refusal = REFUSALS.get((program.name, family, name), "")
            if name == "adapter":
                yield Job(family, name, bundle.with_name("base"), bundle, directory, refusal)
            else:
                yield Job(family, name, directory, directory if name.startswith("w") else bundle, None, refusal)


def ours(directories: set[Path], rows: list[dict[str, str]]) -> dict[str, list[str]]:
    """The answers of `sightline.load`, which a file beside the models keeps."""
    import sightline
    from data_pipeline.images import open_image
    from eval.predictor import Decoding, Query, Turn

    file = FOLDER / "ours.json"
    found: dict[str, list[str]] = json.loads(file.read_text()) if file.exists() else {}
    queries = [Query((open_image(Path(row["image"])),), (Turn("user", row["question"]),)) for row in rows]
    for directory in sorted(directories):
        key = str(directory.relative_to(FOLDER))
        if key not in found:
            model = sightline.load(directory, device="cpu")
            found[key] = model.answer(queries, Decoding(max_new_tokens=TOKENS), batch_size=len(queries))
            file.write_text(json.dumps(found, indent=1))
        assert len(set(found[key])) > len(rows) // 2, f"{directory}: the answers must tell the questions apart"
    return found


def asked(program: Program, jobs: list[Job], rows: list[dict[str, str]]) -> dict[str, Any]:
    """What the program answers: job -> mode -> answers, or what it said."""
    work = FOLDER / "asked" / program.name
    work.mkdir(parents=True, exist_ok=True)
    words = [
        {
            "name": job.name,
            "directory": str(job.directory),
            "adapter": str(job.adapter) if job.adapter else None,
            "dtype": "bfloat16" if job.format == "w4a16" else "float32",
            "modes": MODES[program.asker],
            "questions": rows,
            "tokens": TOKENS,
        }
        for job in jobs
    ]
    (work / "jobs.json").write_text(json.dumps(words))
    (work / "answers.json").unlink(missing_ok=True)
    asker = Path(__file__).with_name("askers") / program.asker
    command = [program.python, str(asker), str(work / "jobs.json"), str(work / "answers.json")]
    with (work / "log.txt").open("w") as log:
        done = subprocess.run(command, cwd=work, env=program.variables, stdout=log, stderr=log, check=False)
    found = json.loads((work / "answers.json").read_text()) if (work / "answers.json").exists() else {}
    for job in jobs:
        found.setdefault(job.name, f"ended with {done.returncode}: {(work / 'log.txt').read_text()[-300:]}")
    return found


@dataclass(frozen=True)
class Cell:
    """One line of the table: how many answers of a mode are ours, or the refusal."""

    family: str
    format: str
    program: str
    said: str
    right: bool


def compare(program: Program, job: Job, answers: Any, expected: list[str]) -> Iterator[Cell]:
    """A job's answers against ours."""
    if isinstance(answers, str):
        last = answers.strip().splitlines()[-1][:200]
        right = bool(job.refusal) and job.refusal in answers.lower()
        yield Cell(job.family, job.format, program.name, f"refused: {last}", right)
        return
    for mode, texts in answers.items():
        same = sum(text.strip() == ours.strip() for text, ours in zip(texts, expected, strict=True))
        least = LEAST.get((program.name, job.format), 1.0) * len(expected)
        right = same >= least and not job.refusal
        yield Cell(job.family, job.format, f"{program.name} {mode}", f"{same} of {len(expected)}", right)


def asked_llama_cpp(
    made: dict[str, dict[str, Path | str]], rows: list[dict[str, str]], answers: dict[str, list[str]]
) -> Iterator[Cell]:
    """llama.cpp, which lies in this environment; what export refuses for it is its row too."""
    from PIL import Image

    from tools.export.llama_cpp import ask

    for family, formats in made.items():
        directory, bundle = formats["gguf"], formats["bundle"]
        assert isinstance(bundle, Path)
        if isinstance(directory, str):
            yield Cell(family, "gguf", "llama.cpp", f"refused: {directory[:200]}", right=family != "siglip")
            continue
        questions: list[tuple[Image.Image, str]] = [(Image.open(row["image"]), row["question"]) for row in rows]
        found = ask(directory / "model.gguf", directory / "mmproj.gguf", questions, TOKENS)
        expected = answers[str(bundle.relative_to(FOLDER))]
        same = sum(each.text.strip() == ours.strip() for each, ours in zip(found, expected, strict=True))
        right = same >= LEAST["llama.cpp", "gguf"] * len(rows)
        yield Cell(family, "gguf", "llama.cpp", f"{same} of {len(rows)}", right)


def main(names: list[str]) -> int:
    """Make, ask, compare, print the table; returns 0 where all is as documented."""
    programs = [program for program in PROGRAMS if not names or program.name in names]
    rows = models.questions(FOLDER / "images")
    made = models.make(FOLDER / "models")
    jobs = {program: list(jobs_of(program, made)) for program in programs}
    expected = {job.expected for each in jobs.values() for job in each}
    expected |= {each for formats in made.values() if isinstance(each := formats["bundle"], Path)}
    answers = ours(expected, rows)
    cells: list[Cell] = []
    for program in programs:
        make(program)
        found = asked(program, jobs[program], rows)
        for job in jobs[program]:
            cells += _told(compare(program, job, found[job.name], answers[str(job.expected.relative_to(FOLDER))]))
        if program.name == "transformers 5":
            job = jobs[program][0]
            served = ask_served(program, job.directory, rows, TOKENS)
            cells += _told(compare(program, job, {"serve": served}, answers[str(job.expected.relative_to(FOLDER))]))
    if not names or "llama.cpp" in names:
        cells += _told(asked_llama_cpp(made, rows, answers))
    wrong = [cell for cell in cells if not cell.right]
    print(f"{len(cells) - len(wrong)} of {len(cells)} as documented")
    return int(bool(wrong))


def _told(cells: Iterator[Cell]) -> Iterator[Cell]:
    for cell in cells:
        print(
            f"{'   ' if cell.right else '!! '}{cell.family:8} {cell.format:8} {cell.program:28} {cell.said}", flush=True
        )
        yield cell


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
