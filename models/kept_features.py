"""Features of a frozen vision encoder on disk: a picture that is seen again is read, not computed.

    pixels_TCHW --key of each picture--> all on disk --> features_TPV
                                     '-> one is not  --> the encoder, for the whole micro-batch --> kept

    PATH/ab/abcdef...   a picture's features, and a digest of them and of their key
    PATH/bytes          what all entries take, added up under a lock

A key is a digest of everything that the numbers depend on: the normalised pixels, the encoder's weights, configuration,
layer and dtype, the number of pictures that are computed at once, libraries, processor and threads. So nothing is ever
out of date, and what is read equals what would have been computed, bit for bit. Owns the files and their limit; who may
use it is the trainer's decision (`trainer.inputs`).

T pictures (tiles) of a micro-batch, C channels, H height, W width, P image tokens, V the encoder's width.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.common.errors import DISK_FAULTS, InputError
from models.common.files import locked, write_bytes

logger = logging.getLogger(__name__)

_DIGEST_BYTES = 16

Compute = Callable[[Tensor], Tensor]
"""pixels [T, C, H, W] -> features [T, P, V]."""


class KeptFeatures:
    """The entries of one encoder in a directory that any number of encoders, ranks and runs may share."""

    def __init__(self, directory: Path, limit_bytes: int, encoder: bytes) -> None:
        self._directory, self._limit_bytes, self._encoder = directory, limit_bytes, encoder
        self._layout: _Layout | None = None
        """Of what the encoder computes, once it has."""
        self._is_full = False

    @classmethod
    def open(cls, directory: Path, limit_gb: float, model: nn.Module, *facts: Any) -> KeptFeatures:
        """Open or make the directory for a model that is frozen and on its device.

        Args:
            facts: what decides the features beside the model: layer, tokens that are skipped.

        Raises:
            InputError: the directory cannot be written.
        """
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with locked(directory / ".lock"):
                (directory / "bytes").write_text(str(_bytes_of(directory)))
        except OSError as error:
            raise InputError(f"model.vision.keep_features.path: {directory} cannot be written ({error})") from error
        return cls(directory, int(limit_gb * 1e9), _encoder_digest(model, facts))

    def features(self, pixels_TCHW: Tensor, compute: Compute) -> Tensor:
        """What `compute` gives for these pixels, [T, P, V]; it is called unless all of them are on disk."""
        host_TCHW = pixels_TCHW.cpu()
        keys = [self._key(picture_CHW, len(host_TCHW)) for picture_CHW in host_TCHW]
        if self._layout is not None:
            read = [self._read(key, self._layout.shape_PV, pixels_TCHW.dtype) for key in keys]
            found = [features_PV for features_PV in read if features_PV is not None]
            if len(found) == len(keys):
                return self._layout.joined(found, pixels_TCHW.device)
        features_TPV = compute(pixels_TCHW)
        if self._layout is None:
            _check_company(pixels_TCHW, features_TPV, compute)
            self._layout = _Layout.of(features_TPV)
        for key, features_PV in zip(keys, features_TPV.cpu(), strict=True):
            self._keep(key, features_PV)
        return features_TPV

    def _key(self, picture_CHW: Tensor, num_pictures: int) -> bytes:
        digest = hashlib.blake2b(self._encoder, digest_size=_DIGEST_BYTES)
        digest.update(f" {num_pictures} ".encode())
        digest.update(_bytes(picture_CHW))
        return digest.digest()

    def _file(self, key: bytes) -> Path:
        name = key.hex()
        return self._directory / name[:2] / name

    def _read(self, key: bytes, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """None where there is no such entry, or one that is not what was written."""
        try:
            data = self._file(key).read_bytes()
        except OSError:
            return None
        values, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
        num_bytes = dtype.itemsize * shape[0] * shape[1]
        if len(values) != num_bytes or digest != _entry_digest(key, values):
            return None
        return torch.frombuffer(bytearray(values), dtype=dtype).view(shape)

    def _keep(self, key: bytes, features_PV: Tensor) -> None:
        """Write an entry unless it is there or the limit is reached; a full disk costs the entry, not the run."""
        file = self._file(key)
        if self._is_full or self._read(key, tuple(features_PV.shape), features_PV.dtype) is not None:
            return
        values = _bytes(features_PV)
        data = values + _entry_digest(key, values)
        try:
            with locked(self._directory / ".lock"):
                taken = self._taken_bytes() + len(data)
                if taken > self._limit_bytes:
                    self._stop(
                        f"{self._limit_bytes / 1e9:g} GB are taken; raise limit_gb, or remove what is not needed"
                    )
                    return
                (self._directory / "bytes").write_text(str(taken))  # before the entry: a kill leaves it too high
                file.parent.mkdir(exist_ok=True)
                write_bytes(file, data)
        except OSError as error:
            if error.errno not in DISK_FAULTS:
                raise
            self._stop(str(error))

    def _taken_bytes(self) -> int:
        try:
            return int((self._directory / "bytes").read_text())
        except (OSError, ValueError):  # removed or damaged since
            return _bytes_of(self._directory)

    def _stop(self, reason: str) -> None:
        self._is_full = True
        logger.warning(f"{self._directory}: no more features are kept: {reason}; what is not kept is computed")


@dataclass(frozen=True)
class _Layout:
    """How features lie in memory: torch's linear layers add their bias otherwise where the input is not contiguous."""

    shape_PV: tuple[int, ...]
    strides_TPV: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, features_TPV: Tensor) -> _Layout:
        return cls(tuple(features_TPV.shape[1:]), features_TPV.stride(), int(features_TPV.storage_offset()))

    def joined(self, found: list[Tensor], device: torch.device) -> Tensor:
        """The pictures' features [T, P, V] as the encoder's output would lie."""
        flat = torch.empty(self.offset + len(found) * self.strides_TPV[0], dtype=found[0].dtype, device=device)
        features_TPV = flat.as_strided((len(found), *self.shape_PV), self.strides_TPV, self.offset)
        return features_TPV.copy_(torch.stack(found))


def _check_company(pixels_TCHW: Tensor, features_TPV: Tensor, compute: Compute) -> None:
    """Raise InputError where a picture's features depend on which pictures stand beside it, in which place."""
    if not torch.equal(compute(pixels_TCHW.flip(0)).flip(0), features_TPV):
        raise InputError(
            "model.vision.keep_features: on this machine a picture's features depend in their last bits on the pictures"
            " that are computed with it, so training would not be what it is without; leave keep_features out"
        )


def _encoder_digest(model: nn.Module, facts: tuple[Any, ...]) -> bytes:
    """Of everything but the pixels that decides a feature's bits."""
    import transformers

    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    configuration = getattr(model, "config", None)
    described = configuration.to_json_string() if configuration is not None else ""
    versions = (torch.__version__, transformers.__version__)
    digest.update(repr((type(model).__name__, described, facts, versions)).encode())
    tensors = [*model.named_parameters(), *model.named_buffers()]
    digest.update(repr(_processor(tensors[0][1].device)).encode())
    for name, value in tensors:
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(_bytes(value.detach().cpu()))
    return digest.digest()


def _processor(device: torch.device) -> tuple[Any, ...]:
    """What chooses the kernels that compute, and how they split their work."""
    precision = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        return precision, torch.cuda.get_device_name(device), torch.version.cuda
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    name = next((line for line in lines if line.startswith(("model name", "CPU part"))), "")
    return precision, name, torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()


def _entry_digest(key: bytes, values: bytes) -> bytes:
    return hashlib.blake2b(key + values, digest_size=_DIGEST_BYTES).digest()


def _bytes(values: Tensor) -> bytes:
    """The bytes of a tensor on the host, of any dtype."""
    return values.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _bytes_of(directory: Path) -> int:
    """The bytes of all entries. Under the lock nobody writes, so half a file is a killed process's: it is removed."""
    total = 0
    for entry in directory.glob("??/*"):
        if entry.name.endswith(".tmp"):
            entry.unlink()
        else:
            total += entry.stat().st_size
    return total
