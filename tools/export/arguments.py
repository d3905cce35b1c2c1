"""Arguments shared by merge, quantize and bundle, and turning disk errors into one-line messages."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from models.common.errors import InputError

if TYPE_CHECKING:
    from tools.export.golden import Probe


def add_out(parser: argparse.ArgumentParser) -> None:
    """Add the argument for the output directory: the last one, or --out."""
    parser.add_argument("others", nargs="*", metavar="OUT", help="the directory to make; --out OUT says the same")
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)


def out_of(arguments: argparse.Namespace) -> Path:
    """The output directory. Arguments with `=` in them are overrides of a recipe and are kept.

    Raises:
        InputError: none was given, or several.
    """
    named = [each for each in arguments.others if "=" not in each]
    if arguments.out is not None:
        named.append(str(arguments.out))
    if len(named) != 1:
        raise InputError(f"give one directory to make, as the last argument; found {', '.join(named) or 'none'}")
    return Path(named[0])


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Turn an error of the disk (no room, no permission) inside the block into an InputError that names the file."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"{error.filename or out}: cannot be written or read ({reason}); nothing was left") from error
    except Exception as error:  # safetensors and tokenizers raise their own exception types
        if type(error).__name__ != "SafetensorError" and "os error" not in str(error):
            raise
        raise InputError(f"{out}: cannot be written ({error}); nothing was left") from error


def add_golden(parser: argparse.ArgumentParser) -> None:
    """Add arguments for the golden set of the parity report, and for the memory to open a bundle."""
    parser.add_argument("--golden", type=Path, help="JSON list of {image, question, answer} to measure parity on")
    parser.add_argument("--probes", type=int, help="how many of the golden set are read (default: all)")
    parser.add_argument(
        "--memory-gb", type=float, help="what opening the bundle whole may take (default: what is free)"
    )


def golden_set(arguments: argparse.Namespace) -> list[Probe]:
    """The golden set that `--golden` and `--probes` select.

    Raises:
        InputError: no probe at all, or a file that is not a golden set.
    """
    from tools.export.golden import drawn, load_golden

    if arguments.probes is not None and arguments.probes < 1:
        raise InputError(f"--probes {arguments.probes}: at least one is needed")
    probes = load_golden(arguments.golden) if arguments.golden else drawn()
    return probes[: arguments.probes]
