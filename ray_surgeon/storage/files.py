"""Files on any fsspec URI: a local path, s3://bucket/key, memory://... Tensors are safetensors, records are JSON.

A file appears whole or not at all: local files are written beside their place and renamed, object stores publish an
object when its upload ends.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import math
import os
import shutil
import struct
import tempfile
import threading
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import torch
from filelock import FileLock
from fsspec.implementations.local import LocalFileSystem
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ray_surgeon.storage.retrying import tries_again

_MAX_HEADER_BYTES = 25_000_000
"""Of a safetensors file; the format allows four times that, a file of a large model has some 100 kB."""
MAX_JSON_BYTES = 64 * 2**20
"""Tokenizers have tens of megabytes; more is no description of anything."""
_ITEM_BYTES = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "U16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
_ITEM_BYTES |= {"F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""Those of which a tensor is ever read."""
_FINGERPRINT_BYTES = 65536


def cache_folder() -> Path:
    """Return where downloads and conversions are kept: ``$RAY_SURGEON_CACHE``, or below ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ray_surgeon"
    return Path(os.environ.get("RAY_SURGEON_CACHE") or default)


def join(uri: str, *parts: str) -> str:
    """Append path parts to a URI."""
    return "/".join([uri.rstrip("/"), *parts])


def open_filesystem(uri: str) -> tuple[Any, str]:
    """Return the fsspec file system of a URI and the path on it.

    Raises:
        ValueError: the protocol is unknown or its package is not installed.
    """
    try:
        filesystem, path = fsspec.core.url_to_fs(uri)
    except ImportError as error:
        extra = "pip install 's3fs' (or ray-surgeon[s3])" if uri.startswith("s3") else f"install its fsspec package ({error})"
        raise ValueError(f"{uri}: the storage protocol needs a package that is not installed; {extra}") from error
    except ValueError as error:
        raise ValueError(f"{uri}: {error}; give a local path or a URI that fsspec knows, such as s3://bucket/folder") from error
    if "hf" not in filesystem.protocol:  # whose content is pinned to a commit
        filesystem.invalidate_cache()  # another worker may have written meanwhile
    return filesystem, path


@tries_again
def exists(uri: str) -> bool:
    """Whether a file or folder is there."""
    filesystem, path = open_filesystem(uri)
    return bool(filesystem.exists(path))


@tries_again
def size_bytes(uri: str) -> int | None:
    """Return the size of a file, or None if it is not there or its server does not say."""
    filesystem, path = open_filesystem(uri)
    try:
        size = filesystem.size(path)
    except FileNotFoundError:
        return None
    return None if size is None else int(size)


@tries_again
def remove(uri: str) -> None:
    """Remove a file."""
    filesystem, path = open_filesystem(uri)
    filesystem.rm_file(path)


@tries_again
def download(uri: str, target: Path) -> None:
    """Copy a file to a local path."""
    filesystem, path = open_filesystem(uri)
    filesystem.get_file(path, str(target))


@tries_again
def put_file(uri: str, source: Path) -> None:
    """Copy a local file, whole or not at all."""
    with tempfile.TemporaryDirectory(dir=_scratch_folder(uri), prefix=".writing-") as folder:
        _upload(uri, Path(shutil.copyfile(source, Path(folder) / "file")))


@tries_again
def list_names(uri: str) -> list[str]:
    """Return the sorted names in a folder; an absent folder is empty."""
    filesystem, path = open_filesystem(uri)
    if not filesystem.exists(path):
        return []
    return sorted(entry.rstrip("/").rpartition("/")[2] for entry in filesystem.ls(path, detail=False))


@tries_again
def glob(uri: str) -> list[str]:
    """Return the sorted URIs of the files that a pattern with * matches, or of the one file it names."""
    filesystem, path = open_filesystem(uri)
    paths = filesystem.glob(path) if "*" in path else [path] * bool(filesystem.exists(path))
    return sorted(str(filesystem.unstrip_protocol(found)) for found in paths)


@tries_again
def read_bytes(uri: str) -> bytes:
    """Read a whole file."""
    filesystem, path = open_filesystem(uri)
    content = filesystem.cat_file(path)
    assert isinstance(content, bytes)
    size = filesystem.size(path)
    if size not in (None, len(content)):  # web servers need not say the size
        raise OSError(errno.EIO, f"{uri}: {len(content)} of {size} bytes came")
    return content


def check_size(uri: str, max_bytes: int, what: str) -> None:
    """Refuse a file that would fill the memory.

    Raises:
        ValueError: it has more than `max_bytes`; `what` says what to do.
    """
    size = size_bytes(uri)
    if size is not None and size > max_bytes:
        raise ValueError(f"{uri}: has {size} bytes, more than the limit of {max_bytes}; {what}")


def read_text(uri: str) -> str:
    """Read a UTF-8 file.

    Raises:
        ValueError: it is not UTF-8.
    """
    try:
        return read_bytes(uri).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{uri}: not UTF-8 text ({error.reason} at byte {error.start}); convert the file to UTF-8") from error


def read_lines(uri: str) -> Iterator[str]:
    """Yield the lines of a UTF-8 file without reading all of it at once.

    Raises:
        ValueError: a line is too long, or not UTF-8.
    """
    with open(local_copy(uri), "rb") as file:
        for number in itertools.count(1):
            line = file.readline(MAX_JSON_BYTES + 1)
            if not line:
                return
            if len(line) > MAX_JSON_BYTES:
                raise ValueError(f"{uri}: line {number} is longer than {MAX_JSON_BYTES} bytes; give one record a line")
            try:
                yield line.decode().rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise ValueError(f"{uri}: line {number} is not UTF-8 text ({error.reason}); convert the file to UTF-8") from error


@tries_again
def _upload(uri: str, source: Path) -> None:
    filesystem, path = open_filesystem(uri)
    if isinstance(filesystem, LocalFileSystem):
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(source, target)
    else:
        filesystem.put_file(str(source), path)
        written = filesystem.info(path)["size"]
        if written != source.stat().st_size:
            raise OSError(errno.EIO, f"{uri}: {written} of {source.stat().st_size} bytes arrived")


def _scratch_folder(uri: str) -> str | None:
    """Return a folder from which `_upload` is a rename, for local targets."""
    filesystem, path = open_filesystem(uri)
    if not isinstance(filesystem, LocalFileSystem):
        return None
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return str(Path(path).parent)


def write_text(uri: str, text: str) -> None:
    """Write a UTF-8 file, whole or not at all."""
    with tempfile.TemporaryDirectory(dir=_scratch_folder(uri), prefix=".writing-") as folder:
        scratch = Path(folder) / "file"
        scratch.write_text(text, encoding="utf-8")
        _upload(uri, scratch)


def is_local(uri: str) -> bool:
    """Whether a URI is a path on this machine, or on a file system that it mounts."""
    return isinstance(open_filesystem(uri)[0], LocalFileSystem)


def append_line(uri: str, line: str) -> None:
    """Append one line to a local text file."""
    _, path = open_filesystem(uri)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(line + "\n")


def read_json(uri: str) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: it is not JSON, or far too large.
    """
    check_size(uri, MAX_JSON_BYTES, "this is no description of a model; fetch it again")
    try:
        return json.loads(read_text(uri))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{uri}: not valid JSON ({error}); the file is damaged or is another kind of file") from error


def write_json(uri: str, record: object) -> None:
    """Write a record as indented JSON."""
    write_text(uri, json.dumps(record, indent=2) + "\n")


def write_tensors(uri: str, tensors: Mapping[str, Tensor]) -> int:
    """Write tensors as one safetensors file and return its size in bytes."""
    with tempfile.TemporaryDirectory(dir=_scratch_folder(uri), prefix=".writing-") as folder:
        scratch = Path(folder) / "file"
        try:
            save_file({name: t.contiguous().cpu() for name, t in tensors.items()}, scratch, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{uri}: cannot write: {error}; free space on the disk, then go on with --resume") from error
        scratch.chmod(0o644)  # safetensors writes 0600, which another user that serves the model could not read
        size = scratch.stat().st_size
        _upload(uri, scratch)
    return size


@tries_again
def local_copy(uri: str) -> Path:
    """Return a local path of a file: itself, or a copy kept in the cache, keyed by its URI, size and version."""
    filesystem, path = open_filesystem(uri)
    if isinstance(filesystem, LocalFileSystem):
        return Path(path)
    info = filesystem.info(path)
    version = f"{uri} {info['size']} {info.get('ETag') or info.get('LastModified') or info.get('created') or ''}"
    target = cache_folder() / "files" / hashlib.sha256(version.encode()).hexdigest()[:32] / path.rpartition("/")[2]
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(target) + ".lock"):
        if not target.exists():
            partial = target.with_name(target.name + ".partial")
            filesystem.get_file(path, str(partial))
            if info["size"] not in (None, partial.stat().st_size):
                raise OSError(errno.EIO, f"{uri}: {partial.stat().st_size} of {info['size']} bytes came")
            os.replace(partial, target)
    return target


def read_tensors(uri: str, names: Container[str] | None = None) -> dict[str, Tensor]:
    """Read a safetensors file, or only the tensors of the given names."""
    reader = TensorReader()
    return {name: reader.read(uri, name) for name in reader.names(uri) if names is None or name in names}


class TensorReader:
    """Reads single tensors of safetensors files: a local file is mapped into memory, of another only the tensor's bytes are fetched."""

    def __init__(self) -> None:
        """Start without open files."""
        self._open: dict[str, Any] = {}
        self._headers: dict[str, SafetensorsHeader] = {}
        self._lock = threading.Lock()

    def names(self, uri: str) -> list[str]:
        """Return the names of a file's tensors."""
        return list(self._header(uri).shapes)

    def read(self, uri: str, name: str) -> Tensor:
        """Return a tensor; a local one must not be written to."""
        if is_local(uri):
            with self._lock:
                if uri not in self._open:
                    self._open[uri] = safe_open(open_filesystem(uri)[1], framework="pt")
            tensor = self._open[uri].get_tensor(name)
            assert isinstance(tensor, Tensor)
            return tensor
        header = self._header(uri)
        start, end = header.bytes_of[name]
        content = bytearray(_read_part(uri, start, end))
        dtype = _DTYPES[header.dtypes[name]]
        return (
            torch.frombuffer(content, dtype=dtype).view(header.shapes[name]) if content else torch.empty(header.shapes[name], dtype=dtype)
        )

    def _header(self, uri: str) -> SafetensorsHeader:
        with self._lock:
            if uri not in self._headers:
                self._headers[uri] = read_safetensors_header(uri)
            return self._headers[uri]


@dataclass(frozen=True)
class SafetensorsHeader:
    """What a safetensors file says of its tensors."""

    shapes: Mapping[str, tuple[int, ...]]  # by name
    dtypes: Mapping[str, str]  # in the format's own words, e.g. "BF16"
    bytes_of: Mapping[str, tuple[int, int]]  # first byte and the one after the last, in the file
    fingerprint: str  # SHA-256 over the header, the file's size and its last 64 KiB


def _read_range(uri: str, start: int, end: int) -> bytes:
    """Read bytes once; callers try again."""
    filesystem, path = open_filesystem(uri)
    content: bytes = filesystem.cat_file(path, start=start, end=end)
    if len(content) != end - start:
        raise OSError(errno.EIO, f"{uri}: {len(content)} of {end - start} bytes came")
    return content


_read_part = tries_again(_read_range)


@tries_again
def read_safetensors_header(uri: str) -> SafetensorsHeader:
    """Read what a safetensors file says of its tensors, without reading them, by ranged reads.

    Raises:
        ValueError: the file is not a whole safetensors file.
    """
    filesystem, path = open_filesystem(uri)
    size = int(filesystem.size(path))
    prefix = _read_range(uri, 0, min(8, size))
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
    if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
        raise ValueError(f"{uri}: not a safetensors file, or cut short ({size} bytes, header of {length}); fetch it again")
    raw = _read_range(uri, 8, 8 + length)
    try:
        header = json.loads(raw)
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        shapes = {name: tuple(int(n) for n in entry["shape"]) for name, entry in entries.items()}
        end = _end_of_data(entries, shapes)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{uri}: the safetensors header is damaged ({error}); fetch the file again") from error
    if 8 + length + end != size:
        raise ValueError(f"{uri}: cut short or padded: {size} bytes, {8 + length + end} by its header; fetch it again")
    tail = _read_range(uri, max(8 + length, size - _FINGERPRINT_BYTES), size)
    places = {name: (8 + length + int(e["data_offsets"][0]), 8 + length + int(e["data_offsets"][1])) for name, e in entries.items()}
    fingerprint = hashlib.sha256(raw + str(size).encode() + tail).hexdigest()
    return SafetensorsHeader(shapes, {name: str(entry["dtype"]) for name, entry in entries.items()}, places, fingerprint)


def _end_of_data(entries: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return where the last tensor ends, after checking that they follow each other and have the bytes of their shapes.

    Raises:
        ValueError: names the tensor that does not.
    """
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: int(item[1]["data_offsets"][0])):
        first, last = (int(offset) for offset in entry["data_offsets"])
        if entry["dtype"] not in _ITEM_BYTES:
            raise ValueError(f"{name} has the unknown dtype {entry['dtype']}")
        size = math.prod(shapes[name]) * _ITEM_BYTES[entry["dtype"]]
        if min(shapes[name], default=0) < 0 or (first, last - first) != (end, size):
            raise ValueError(f"{name} of shape {shapes[name]} and dtype {entry['dtype']} cannot lie at bytes {first} to {last}")
        end = last
    return end
