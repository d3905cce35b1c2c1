"""What transformers opens in a directory that somebody else made: its errors become one line, and its silence is heard.

    files --headers known to be whole--> from_pretrained --nothing missing, nothing of another shape--> the model

transformers raises a dozen kinds for damaged files, some after it has read all of them, and draws at random what is
missing in them. Every directory that it reads for us, a bundle or a pretrained part, is read in here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.common.errors import InputError, single_line
from models.common.source import check_loaded

if TYPE_CHECKING:
    from models.common.tensors import Tensors


@contextmanager
def opening(directory: Path, what: str, advice: str) -> Iterator[None]:
    """For a block in which a library reads a directory: what it raises is an InputError that names the directory.

    Args:
        what: what is wrong with the directory then, the middle of the sentence.
        advice: what to do, its end.
    """
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:  # of transformers, tokenizers, safetensors, torch
        if type(error).__name__ == "OutOfMemoryError":
            raise
        raise InputError(f"{directory} {what}: {single_line(error)}; {advice}") from error


def load_from_tensors(
    model_class: Any,
    config: Any,
    tensors: Tensors,
    directory: Path,
    *,
    may_lack: Sequence[str] = (),
    advice: str = "fetch or copy it again",
    **options: Any,
) -> Any:
    """The model of a class and a configuration whose weights are some of a directory's tensors; see `load_whole`.

    Args:
        tensors: by their names in the class.
        directory: where they lie, for errors.
    """
    with opening(directory, "cannot be loaded", advice):
        model, found = model_class.from_pretrained(
            None,
            config=config,
            state_dict={name: tensors.read(name) for name in tensors},
            output_loading_info=True,
            trust_remote_code=False,
            **options,
        )
    check_loaded(str(directory), found, unused=tuple(may_lack))
    return model


def load_whole(
    load: Callable[..., Any], directory: Path, *, may_lack: Sequence[str] = (), advice: str, **options: Any
) -> Any:
    """The model that a class's `from_pretrained` makes of a directory, all of whose weights came from its files.

    Args:
        load: `from_pretrained`.
        may_lack: parts of the names of weights that nobody uses, so that files need not have them.
        advice: what to do about a directory that cannot be used.
        options: further arguments of `load`.

    Raises:
        InputError: a file is damaged, a weight is missing or has another shape, or the directory cannot be read.
    """
    from models.common.sharded import TensorFiles, has_tensor_files

    if has_tensor_files(directory):
        TensorFiles.open(directory)  # at once, and by name: transformers finds a damaged file when it comes to it
    with opening(directory, "cannot be loaded", advice):
        model, found = load(directory, output_loading_info=True, **options)
    check_loaded(str(directory), found, unused=tuple(may_lack))
    return model
