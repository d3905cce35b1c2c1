"""Installs the five packages, the `sightline` module and the `sightline` command."""

from setuptools import find_packages, setup

PACKAGES = ("trainer", "models", "data_pipeline", "eval", "tools")

CORE = [
    "torch>=2.11",
    "transformers>=5.17",
    "peft>=0.21",
    "bitsandbytes>=0.50",
    "safetensors>=0.8",
    "tokenizers>=0.22",
    "accelerate>=1.15",
    "deepspeed>=0.19",
    "ninja",
    "webdataset>=1.0",
    "fsspec>=2024.6",
    "numpy>=2.0",
    "pandas>=2.2",
    "pyarrow>=17.0",
    "pillow>=12.0",
    "pydantic>=2.10",
    "pyyaml>=6.0",
    "rich>=14.0",
    "tqdm>=4.66",
    "pycocoevalcap>=1.2",
    "pycocotools>=2.0.11",
    "gradio>=6.0",
    "wandb>=0.20",
    "tensorboard>=2.18",
]

setup(
    name="sightline",
    version="0.1.0",
    description="Train vision-language models with DeepSpeed ZeRO and hand back a bundle that runs on one GPU.",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=[*PACKAGES, *(f"{name}.*" for name in PACKAGES)]),
    py_modules=["sightline"],
    install_requires=CORE,
    extras_require={
        "open_clip": ["open_clip_torch>=3.0"],
        "gpu": ["flash-attn>=2.7"],
        "dev": [
            "pytest>=9.0",
            "pytest-timeout>=2.4",
            "pytest-xdist>=3.8",
            "filelock>=3.12",
            "hypothesis>=6.100",
            "ruff>=0.15",
            "mypy>=2.0",
            "import-linter>=2.5",
            "types-PyYAML",
            "playwright>=1.50",
        ],
    },
    entry_points={"console_scripts": ["sightline=tools.cli:main"]},
)
