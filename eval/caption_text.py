"""Captions as the tokens that caption metrics compare.

Owns: the PTB tokenization that published figures use, which needs Java, and a plain one in Python without it. Does not
    own metrics. Scores from the two are NOT comparable, so every result names the one it used.

    ptb      Stanford CoreNLP 3.4.1's PTBTokenizer, lower-cased, without the punctuation that coco-caption drops; the
             jar is part of pycocoevalcap
    plain    lower case; a word is a run of letters, digits and underscores, with inner hyphens kept, and English
             clitics split off as PTB does (don't -> do n't, it's -> it 's); everything else is dropped
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

Tokenizer = Literal["ptb", "plain"]
Captions = dict[str, list[str]]
"""Per image: captions, or captions as words joined by single spaces."""

PTB_TIMEOUT_S = 300.0

_PLAIN_WORD = re.compile(r"n't\b|'(?:s|re|ve|ll|d|m)\b|[\w-]*\w(?=n't\b)|\w+(?:-\w+)*")


class JavaError(Exception):
    """Java is missing or failed. The message is the reason, as a clause."""


@dataclass(frozen=True)
class Tokenized:
    """Captions as words, the tokenization that made them, and the reason where that was not PTB."""

    captions: tuple[Captions, ...]
    tokenizer: Tokenizer
    reason: str | None


def java_path() -> str:
    """The `java` on PATH.

    Raises:
        JavaError: there is none.
    """
    found = shutil.which("java")
    if found is None:
        raise JavaError("Java was not found on PATH")
    return found


def tokenize(*groups: Mapping[str, Sequence[str]], timeout_s: float = PTB_TIMEOUT_S) -> Tokenized:
    """Tokenize groups of captions (references, hypotheses) by PTB, or plainly where Java fails; all in one way."""
    sentences = [_one_line(caption) for group in groups for captions in group.values() for caption in captions]
    try:
        lines, tokenizer, reason = ptb_tokenize(sentences, timeout_s), "ptb", None
    except JavaError as error:
        lines, tokenizer, reason = [plain_tokenize(sentence) for sentence in sentences], "plain", str(error)
    rest = iter(lines)
    grouped = tuple({key: [next(rest) for _ in captions] for key, captions in group.items()} for group in groups)
    return Tokenized(grouped, "ptb" if tokenizer == "ptb" else "plain", reason)


def plain_tokenize(sentence: str) -> str:
    """The documented plain tokenization: words joined by single spaces."""
    return " ".join(_PLAIN_WORD.findall(sentence.lower().replace("’", "'")))


def ptb_tokenize(sentences: Sequence[str], timeout_s: float = PTB_TIMEOUT_S) -> list[str]:
    """Stanford's PTB tokens of each one-line sentence, lower-cased, without punctuation, joined by single spaces.

    pycocoevalcap's own wrapper writes into site-packages, can wait without end, and shifts every later caption where a
    caption holds a line separator that is not a newline; so its jar is called here.

    Raises:
        JavaError: Java is missing, fails, hangs past `timeout_s`, or answers with another number of lines.
    """
    from pycocoevalcap.tokenizer import ptbtokenizer

    jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    arguments = ["-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    output = _run_java(arguments, "\n".join(sentences) + "\n", timeout_s)
    lines = output.removesuffix("\n").split("\n")
    if len(lines) != len(sentences):
        raise JavaError(f"the PTB tokenizer gave {len(lines)} lines for {len(sentences)} captions")
    dropped = frozenset(ptbtokenizer.PUNCTUATIONS)
    return [" ".join(word for word in line.split() if word not in dropped) for line in lines]


def start_java(arguments: Sequence[str], errors: IO[bytes]) -> subprocess.Popen[bytes]:
    """Start Java with pipes for input and output, UTF-8 in any locale, its error output in the file `errors`.

    It gets a process group of its own, for `stop`: `java` is often a script that starts another program.

    Raises:
        JavaError: there is no Java, or it can't be started.
    """
    command = [java_path(), "-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8", *arguments]
    pipe = subprocess.PIPE
    try:
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors, start_new_session=True)
    except OSError as error:
        raise JavaError(f"Java could not be started ({error.strerror})") from None


def stop(process: subprocess.Popen[bytes]) -> None:
    """Kill a process of `start_java` and its children; does nothing where it has ended."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_line(errors: IO[bytes]) -> str:
    """The last line of an error output, which may be long."""
    size = errors.seek(0, os.SEEK_END)
    errors.seek(max(0, size - 4096))
    return (errors.read().decode(errors="replace").strip().splitlines() or ["no message"])[-1]


def _run_java(arguments: Sequence[str], text: str, timeout_s: float) -> str:
    """Run Java on `text` as its standard input; what it writes to its standard output."""
    with tempfile.TemporaryFile() as errors:
        process = start_java(arguments, errors)
        try:
            output, _ = process.communicate(text.encode(), timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise JavaError(f"the PTB tokenizer gave no answer in {timeout_s:g} s") from None
        finally:
            stop(process)
        if process.returncode != 0:
            raise JavaError(f"Java failed with exit code {process.returncode}: {last_line(errors)}")
    return output.decode()


def _one_line(caption: str) -> str:
    """A caption may hold newlines, tabs and rarer separators; each tokenizer takes one line per caption."""
    return " ".join(caption.split())
