"""`sightline convert SOURCE OUT`: weights in another format -> a model directory in Hugging Face format.

    model.gguf    a language model, by transformers and `gguf`; its tokenizer and chat template come with it
    model.onnx    the DINOv2 tower in an ONNX graph, by `onnx`; compared with the graph's own output
    DIRECTORY     a vision encoder in Hugging Face format whose pictures get another size (--image-size)

Owns the command line. GGUF and ONNX need `pip install 'sightline[photos]'`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from models.common.errors import InputError, run_cli
from models.common.files import new_directory
from models.common.source import FOREIGN_FORMATS, foreign_weights


def main(argv: list[str]) -> int:
    """Write OUT, complete or not at all; an OUT that is there already is refused."""
    arguments = _parser().parse_args(argv)
    source = weights_at(arguments.source)
    size: int | None = arguments.image_size
    if size is not None and size < 1:
        raise InputError(f"--image-size {size}: a number of pixels is needed")
    if arguments.out.exists():
        raise InputError(f"{arguments.out}: is there already; name another directory, or remove it")
    if source.suffix == ".gguf":
        _refuse_size(source, size)
        with _needs("gguf"), new_directory(arguments.out) as out:
            from tools.convert.language import write_language

            print(write_language(source, out))
    elif source.suffix == ".onnx":
        with _needs("onnx"), new_directory(arguments.out) as out:
            from tools.convert.vision import write_vision

            print(write_vision(source, out, size))
    else:
        if size is None:
            raise InputError(f"{source}: a directory in Hugging Face format already; --image-size gives it another one")
        from tools.convert.image_size import write_resized

        with new_directory(arguments.out) as out:
            print(write_resized(source, out, size))
    print(f"written to {arguments.out}")
    return 0


def weights_at(source: Path) -> Path:
    """The file of GGUF or ONNX at `source` or alone in that directory, or a directory in Hugging Face format.

    Raises:
        InputError: nothing is there, several files are, or neither format.
    """
    if source.is_file() and source.suffix in FOREIGN_FORMATS:
        return source
    if not source.is_dir():
        raise InputError(f"{source}: a .gguf or .onnx file, or a directory, is needed")
    found = foreign_weights(source)
    if len(found) > 1:
        raise InputError(
            f"{source}: name one of its files: {', '.join(str(file.relative_to(source)) for file in found)}"
        )
    if not found and not (source / "config.json").is_file():
        raise InputError(f"{source}: no .gguf, no .onnx and no config.json in it")
    return found[0] if found else source


def _refuse_size(source: Path, size: int | None) -> None:
    if size is not None:
        raise InputError(f"--image-size {size}: {source.name} is a language model, which has no pictures")


@contextmanager
def _needs(package: str) -> Iterator[None]:
    """Raise InputError that says how to install `package` where it is not."""
    if find_spec(package) is None:
        raise InputError(f"the package {package} is needed: pip install 'sightline[photos]'")
    yield


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sightline convert", description="GGUF or ONNX -> a model directory in Hugging Face format."
    )
    parser.add_argument("source", type=Path, help="a .gguf or .onnx file, or a directory")
    parser.add_argument("out", type=Path, help="the directory to make")
    parser.add_argument(
        "--image-size", type=int, help="pixels of a picture's side; a vision encoder's positions are interpolated once"
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
