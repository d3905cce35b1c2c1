"""Installs the five packages, the `sightline` modules and the `sightline` command."""

import re
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

PACKAGES = ("trainer", "models", "data_pipeline", "eval", "tools")

CHECKOUT_ONLY = ("tools.dev", "tools.bench", "tools.examples")
"""Benchmarks, faults to inject and examples: for those who have the repository, so in no wheel."""

CHECKOUT_COMMANDS = {f"tools.{name}" for name in ("chaos", "families", "photos", "quickstart", "report", "toy")}
"""Modules that only call those packages."""

DATA = {"trainer.ds_configs": "*.json", "trainer.recipes": "*.yaml"}
"""Files that are no code; in a checkout they lie beside the packages (`trainer.config.shipped`)."""

VERSION = re.findall(r'^VERSION = "(.+)"', Path(__file__).with_name("sightline_packages.py").read_text("utf-8"), re.M)[
    0
]

# Upper bounds where private parts are used, or where a minor version has changed numbers.
CORE = [
    "torch>=2.11,<2.16",
    "transformers>=5.23,<5.25",
    "peft>=0.21,<0.22",
    "bitsandbytes>=0.50,<0.51",
    "safetensors>=0.8",
    "tokenizers>=0.23.1",
    "sentencepiece>=0.2",
    "protobuf>=4.25.1",
    "accelerate>=1.15",
    "deepspeed>=0.19,<0.20",
    "ninja>=1.11.1",
    "webdataset>=1.0.2",
    "fsspec>=2024.6",
    "numpy>=2.0",
    "pandas>=2.2.2",
    "pyarrow>=17.0",
    "openpyxl>=3.1",
    "pillow>=12.0",
    "pydantic>=2.10",
    "pyyaml>=6.0",
    "rich>=14.0",
    "tqdm>=4.66",
    "packaging>=24.0",
    "pycocoevalcap>=1.2",
    "pycocotools>=2.0.11",
    "gradio>=6.31,<7",
    "fastapi>=0.165",
    "starlette>=1.10",
    "uvicorn>=0.54",
    "uvloop>=0.22",
    "python-multipart>=0.0.34",
    "prometheus-client>=0.26",
    "wandb>=0.20",
    "tensorboard>=2.18",
]


class BuildWithoutCheckoutCommands(build_py):
    """Leaves out `CHECKOUT_COMMANDS`; packages are left out by their names."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        """The modules of a package as (package, module, file)."""
        found = super().find_package_modules(package, package_dir)
        return [each for each in found if f"{each[0]}.{each[1]}" not in CHECKOUT_COMMANDS]


PACKED = ["compressed-tensors>=0.20,<0.21"]
"""What `sightline export --to w4a16` packs weights with, and transformers reads them with."""

LLAMA_CPP = ["gguf>=0.17", "xllamacpp>=2026.10"]
"""What `sightline export --to gguf` writes with, and llama.cpp itself, which is asked whether it computes the same."""

PHOTOS = ["gguf>=0.17", "onnx>=1.19"]
"""What `sightline convert` and `make photos` read weights with."""

setup(
    name="sightline",
    version=VERSION,
    description="Train vision-language models with DeepSpeed ZeRO and hand back a bundle that runs on one GPU.",
    license="MIT",
    python_requires=">=3.10",
    packages=[
        *find_packages(
            include=[*PACKAGES, *(f"{name}.*" for name in PACKAGES)],
            exclude=[*CHECKOUT_ONLY, *(f"{name}.*" for name in CHECKOUT_ONLY)],
        ),
        *DATA,
    ],
    cmdclass={"build_py": BuildWithoutCheckoutCommands},
    package_dir={name: name.rpartition(".")[2] for name in DATA},
    package_data={
        **{name: [pattern] for name, pattern in DATA.items()},
        **{name: ["py.typed"] for name in PACKAGES},
        "eval.benchmarks": ["data/*.yaml"],
    },
    py_modules=["sightline", "sightline_packages"],
    install_requires=CORE,
    extras_require={
        "open_clip": ["open_clip_torch>=3.0"],
        "heic": ["pillow-heif>=1.0"],
        "gpu": ["flash-attn>=2.7"],
        "photos": PHOTOS,
        "w4a16": PACKED,
        "gguf": LLAMA_CPP,
        "dev": [
            *PHOTOS,
            *PACKED,
            *LLAMA_CPP,
            "pytest>=9.0",
            "pytest-timeout>=2.4",
            "pytest-xdist>=3.8",
            "pytest-cov>=6.0",
            "filelock>=3.12",
            "hypothesis>=6.100",
            "ruff>=0.15",
            "mypy>=2.0",
            "import-linter>=2.5",
            "types-PyYAML",
            "playwright>=1.50",
            "codespell>=2.4",
            "build>=1.2",
            "openai>=3.57",
            "httpx>=0.28",
        ],
        "docs": [
            f"{name}; python_version >= '3.11'"  # Sphinx 9 needs it
            for name in ("sphinx>=9.0", "myst-parser>=5.0", "furo>=2025.12", "sphinx-copybutton>=0.5")
        ],
    },
    entry_points={
        "console_scripts": ["sightline=sightline_packages:main"],
        "lmms_eval.models": ["sightline=eval.lmms:manifest"],
    },
)
