"""Copies of files, and what is made of them, on this machine."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock
from fsspec.implementations.local import LocalFileSystem

from ray_surgeon.storage import files
from ray_surgeon.storage.retrying import naming, tries_again


def cache_folder() -> Path:
    """Return where downloads and conversions are kept.

    ``$RAY_SURGEON_CACHE``, or below ``$XDG_CACHE_HOME`` or ``~/.cache``.
    """
    if named := os.environ.get("RAY_SURGEON_CACHE"):
        return Path(named)  # where a user has no home
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ray_surgeon"


def made_once(kind: str, name: str, make: Callable[[Path], None]) -> Path:
    """Return a file or folder of the cache; `make` writes it to another path if it is absent."""
    target = cache_folder() / kind / name
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.exists():
            partial = target.with_name(f"{target.name}.partial")
            make(partial)
            os.replace(partial, target)
    return target


@tries_again
def local_copy(uri: str) -> Path:
    """Return a local path of a file: itself, or a copy in the cache.

    The key is its URI, size and version.
    """
    filesystem, path = files.open_filesystem(uri)
    if isinstance(filesystem, LocalFileSystem):
        return Path(path)
    info = filesystem.info(path)
    tag = info.get("ETag") or info.get("LastModified") or info.get("created") or ""
    key = hashlib.sha256(f"{uri} {info['size']} {tag}".encode()).hexdigest()[:32]

    def fetch(partial: Path) -> None:
        with naming(str(partial)):
            filesystem.get_file(path, str(partial))
        files.check_whole(uri, partial.stat().st_size, info["size"])

    return made_once("files", f"{key}/{path.rpartition('/')[2]}", fetch)


def read_lines(uri: str) -> Iterator[str]:
    """Yield the lines of a UTF-8 file without reading all of it at once.

    Raises:
        ValueError: a line is too long, or not UTF-8.
    """
    with open(local_copy(uri), "rb") as file:
        lines = iter(lambda: file.readline(files.MAX_JSON_BYTES + 1), b"")
        for number, line in enumerate(lines, start=1):
            if len(line) > files.MAX_JSON_BYTES:
                raise ValueError(
                    f"{uri}: line {number} is longer than {files.MAX_JSON_BYTES} bytes; give one "
                    "record a line"
                )
            yield files.decoded(line, f"{uri}: line {number} is").rstrip("\r\n")
