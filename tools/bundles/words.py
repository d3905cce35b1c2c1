"""Words that the command lines of merge, quantize and bundle share."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from models.errors import InputError

if TYPE_CHECKING:
    from tools.bundles.golden import Probe


def add_out(parser: argparse.ArgumentParser) -> None:
    """The directory to make, as the last word or as --out."""
    parser.add_argument("words", nargs="*", metavar="OUT", help="the directory to make; --out OUT says the same")
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)


def out_of(arguments: argparse.Namespace) -> Path:
    """The directory to make; the words with `=` in them are somebody else's."""
    named = [word for word in arguments.words if "=" not in word]
    if arguments.out is not None:
        named.append(str(arguments.out))
    if len(named) != 1:
        raise InputError(f"give one directory to make, as the last word; found {', '.join(named) or 'none'}")
    return Path(named[0])


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Turn what the disk refuses, room above all, into one line that names the file."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"{error.filename or out}: cannot be written or read ({reason}); nothing was left") from error
    except Exception as error:  # safetensors and tokenizers raise kinds of their own
        if type(error).__name__ != "SafetensorError" and "os error" not in str(error):
            raise
        raise InputError(f"{out}: cannot be written ({error}); nothing was left") from error


def add_golden(parser: argparse.ArgumentParser) -> None:
    """What a parity report is measured on."""
    parser.add_argument("--golden", type=Path, help="JSON list of {image, question, answer} to measure parity on")
    parser.add_argument("--probes", type=int, help="how many of the golden set are read (default: all)")


def golden_set(arguments: argparse.Namespace) -> list[Probe]:
    """The golden set that `--golden` and `--probes` ask for."""
    from tools.bundles.golden import drawn, load_golden

    if arguments.probes is not None and arguments.probes < 1:
        raise InputError(f"--probes {arguments.probes}: at least one is needed")
    probes = load_golden(arguments.golden) if arguments.golden else drawn()
    return probes[: arguments.probes]
