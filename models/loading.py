"""What transformers opens in a directory that somebody else made: its errors become one line, and its silence is heard.

    files --headers known to be whole--> from_pretrained --nothing missing, nothing of another shape--> the model

transformers raises a dozen kinds for damaged files, some after it has read all of them, and draws at random what is
missing in them. Every directory that it reads for us, a bundle or a pretrained part, is read in here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.common.errors import InputError, single_line
from models.common.source import check_loaded

if TYPE_CHECKING:
    from torch import Tensor

    from models.common.tensors import Tensors

ONE_BY_ONE = "HF_DEACTIVATE_ASYNC_LOAD"
"""transformers' own variable: weights are read in the order in which they are put into the model."""


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
    _be_quiet()
    with opening(directory, "cannot be loaded", advice), _placed():
        model, found = model_class.from_pretrained(
            None,
            config=config,
            state_dict={name: _Unread(tensors, name) for name in tensors},
            output_loading_info=True,
            trust_remote_code=False,
            **_on_device(options),
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

    _be_quiet()
    if has_tensor_files(directory):
        TensorFiles.open(directory)  # at once, and by name: transformers finds a damaged file when it comes to it
    with opening(directory, "cannot be loaded", advice), _placed():
        model, found = load(directory, output_loading_info=True, **_on_device(options))
    check_loaded(str(directory), found, unused=tuple(may_lack))
    return model


def _be_quiet() -> None:
    from models.quantized import tell_casts_once

    tell_casts_once()


class _Unread:
    """A tensor that transformers reads when it comes to it, as it does those of a file: by `[...]`."""

    def __init__(self, tensors: Tensors, name: str) -> None:
        self._tensors, self._name = tensors, name

    def __getitem__(self, _: Any) -> Tensor:
        return self._tensors.read(self._name)


def _on_device(options: dict[str, Any]) -> dict[str, Any]:
    """Options with the device that weights are read to; quantized ones are quantized there, one by one."""
    from models.placement import current_placement

    device = current_placement().device
    if current_placement().division is not None and "quantization_config" not in options:
        return options  # each tensor is read on the host, and this rank's part of it goes on
    return options if device.type == "cpu" else {**options, "device_map": {"": device}}


@contextmanager
def _placed() -> Iterator[None]:
    """Where the placement divides, divide each weight as soon as it is in its module, before the next one is read.

    transformers has no public way in: `set_param_for_module` (core_model_loading.py of 5.x) is what puts a weight into
    the model that it builds without memory, and it reads all weights at once unless the environment says otherwise.
    tests/models/test_placement.py fails where that has changed.
    """
    from transformers import core_model_loading

    from models.placement import current_placement, divide
    from models.quantized import keep_once

    placement = current_placement()
    if placement.division is None:
        yield
        return
    put: Callable[..., None] = core_model_loading.set_param_for_module

    def put_and_divide(model: Any, name: str, *arguments: Any) -> None:
        put(model, name, *arguments)
        keep_once(model.get_submodule(name.rpartition(".")[0]))
        tied = model.all_tied_weights_keys
        if name not in tied and name not in tied.values():  # whether those are equal is looked at afterwards
            divide(model.get_parameter_or_buffer(name), placement)

    before = os.environ.get(ONE_BY_ONE)
    os.environ[ONE_BY_ONE] = "1"
    core_model_loading.set_param_for_module = put_and_divide
    try:
        yield
    finally:
        core_model_loading.set_param_for_module = put
        del os.environ[ONE_BY_ONE]
        if before is not None:
            os.environ[ONE_BY_ONE] = before
