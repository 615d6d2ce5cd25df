"""Tensors in safetensors files on any fsspec URI.

Single tensors are read by mapping a local file, or by ranged reads of a remote one.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ray_surgeon.config.base import REASON, refusing
from ray_surgeon.storage import files
from ray_surgeon.storage.files import tries_again

_MAX_HEADER_BYTES = 25_000_000
"""Limit on the size of a safetensors header in bytes.

The format allows four times as much; the header of a large model has about 100 kB.
"""
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F32": torch.float32,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
_BAD_HEADER = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""Errors raised by reading a damaged header."""
_FINGERPRINT_BYTES = 65536

_read_part = tries_again(files.read_range)


def write(uri: str, tensors: Mapping[str, Tensor]) -> int:
    """Write tensors as one safetensors file and return its size in bytes."""
    with files.replacing(uri) as scratch:
        on_cpu = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
        try:
            save_file(on_cpu, scratch, metadata={"format": "pt"})
        except SafetensorError as error:
            if re.search("No space|quota", str(error)):
                raise OSError(
                    f"{uri}: cannot write: {error}; free space on the disk, "
                    "then go on with --resume"
                ) from error
            raise OSError(f"{uri}: cannot write: {error}") from error
        # safetensors creates files with mode 0600, which a server under another user cannot read
        scratch.chmod(0o644)
        return scratch.stat().st_size


def read(uri: str) -> dict[str, Tensor]:
    """Read a safetensors file."""
    reader = Reader()
    return {name: reader.read(uri, name) for name in reader.names(uri)}


def read_folder(uri: str) -> dict[str, Tensor]:
    """Read all safetensors files of a folder; a missing folder is empty."""
    tensors = dict[str, Tensor]()
    for file in files.list_names(uri):
        tensors.update(read(files.join(uri, file)))
    return tensors


class Reader:
    """Reads single tensors of safetensors files.

    Local files are mapped into memory; for remote files only the tensor's bytes are read.
    """

    def __init__(self) -> None:
        """Start without open files."""
        self.header = functools.cache(read_header)
        self._mapped = functools.cache(_mapped)

    def names(self, uri: str) -> list[str]:
        """Return the names of a file's tensors."""
        return list(self.header(uri).shapes)

    def read(self, uri: str, name: str, entry: int | None = None) -> Tensor:
        """Return a tensor, or an entry of its first dimension.

        A tensor of a local file must not be written to.
        """
        if files.is_local(uri):
            tensor: Tensor = self._mapped(uri).get_tensor(name)
            if entry is None:
                return tensor
            return tensor[entry]
        shape, dtype, start, end = self.header(uri).entries[name]
        if entry is not None:
            size = (end - start) // shape[0]
            shape = shape[1:]
            end = start + (entry + 1) * size
            start = start + entry * size
        content = bytearray(_read_part(uri, start, end))
        if not content:
            return torch.empty(shape, dtype=_DTYPES[dtype])
        return torch.frombuffer(content, dtype=_DTYPES[dtype]).view(shape)

    def close(self) -> None:
        """Close the files, so that the space of deleted files is freed; later reads reopen them."""
        self._mapped.cache_clear()


def _mapped(uri: str) -> Any:
    return safe_open(files.open_filesystem(uri)[1], framework="pt")


class Entry(NamedTuple):
    """The header's entry of a tensor."""

    shape: tuple[int, ...]
    dtype: str  # name in the format, e.g. "BF16"
    first: int  # first byte in the file
    end: int  # byte after the last


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file."""

    entries: Mapping[str, Entry]  # by name
    fingerprint: str  # SHA-256 over the header, the file's size and its last 64 KiB

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors by name."""
        return {name: entry.shape for name, entry in self.entries.items()}


@tries_again
def read_header(uri: str) -> Header:
    """Read the header of a safetensors file by ranged reads.

    Raises:
        ValueError: the file is not a complete safetensors file.
    """
    filesystem, path = files.open_filesystem(uri)
    size = int(filesystem.size(path))
    length = int.from_bytes(files.read_range(uri, 0, min(8, size)), "little")
    if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
        raise ValueError(
            f"{uri}: not a safetensors file, or cut short ({size} bytes); fetch it again"
        )
    start = 8 + length
    raw = files.read_range(uri, 8, start)
    damaged = f"{uri}: the safetensors header is damaged ({REASON})"
    with refusing(damaged, "fetch the file again", _BAD_HEADER):
        entries, end = _entries(json.loads(raw), start)
    if end != size:
        raise ValueError(
            f"{uri}: cut short or padded ({size} bytes for {end}); fetch it again"
        )
    tail = files.read_range(uri, max(start, size - _FINGERPRINT_BYTES), size)
    fingerprint = hashlib.sha256(raw + str(size).encode() + tail).hexdigest()
    return Header(entries, fingerprint)


def _entries(document: dict[str, Any], start: int) -> tuple[dict[str, Entry], int]:
    """Return the entries of a header by name, and the byte after the last tensor.

    The tensors must start at the byte `start`, have no gaps, and have the sizes of their shapes and
    dtypes.

    Raises:
        ValueError: a tensor violates this; the message names it.
    """
    document.pop("__metadata__", None)
    entries = {}
    end = start
    # an empty tensor starts where the next one does, so they are sorted by their ends, too
    for name, about in sorted(document.items(), key=lambda item: _offsets(item[1])):
        shape = tuple(int(n) for n in about["shape"])
        dtype = about["dtype"]
        first, last = (start + offset for offset in _offsets(about))
        if dtype not in _DTYPES:
            raise ValueError(f"{name} has the unknown dtype {dtype}")
        size = math.prod(shape) * _DTYPES[dtype].itemsize
        if min(shape, default=0) < 0 or (first, last - first) != (end, size):
            raise ValueError(
                f"{name} of shape {shape} cannot lie at bytes {first} to {last}"
            )
        entries[name] = Entry(shape, dtype, first, last)
        end = last
    return {name: entries[name] for name in document}, end


def _offsets(about: dict[str, Any]) -> tuple[int, ...]:
    return tuple(int(offset) for offset in about["data_offsets"])
