"""Files on any fsspec URI: a local path, s3://bucket/key, memory://...

Records are JSON; tensors are in `storage.tensor_files`.

Files are written atomically: local files are written to a temporary folder and renamed, and object
stores publish an object when its upload is complete.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import functools
import json
import math
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import monotonic, sleep
from typing import Any, ParamSpec, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from ray_surgeon.config.base import REASON, refusing

P = ParamSpec("P")
T = TypeVar("T")

PATIENCE_S = 30.0
"""Seconds for which an operation is retried after its first transient error.

Transient errors are the statuses 500 and 503, timeouts, resets and short replies.
"""
FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 5.0
_CLIENT_ERRORS = {"BotoCoreError", "ClientError", "HTTPError", "HttpError", "AzureError"}
"""Names of the errors of object store clients that are not subclasses of OSError."""
_LASTING_ERRORS = {
    "FileNotFoundError",
    "PermissionError",
    "FileExistsError",
    "IsADirectoryError",
    "NotADirectoryError",
    "NoCredentialsError",
    "PartialCredentialsError",
    "ParamValidationError",
    "ProfileNotFound",
    "NoRegionError",
}
"""Names of errors of Python and botocore that are not transient."""
_LASTING_NUMBERS = {
    errno.EINVAL,
    errno.EPERM,
    errno.ENOSYS,
    errno.EMSGSIZE,
    errno.ENAMETOOLONG,
    errno.ENOSPC,
    errno.EDQUOT,
}
"""Error numbers by which s3fs reports that a request was rejected."""
_PASSING_STATUS = (408, 425, 429)
_DAMAGED = ("IncompleteBody", "BadDigest")
"""Codes by which S3 rejects an upload that was truncated or altered in transit.

s3fs reports them like rejected requests, but they are transient.
"""


def _kinds(error: Exception) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}


def _may_pass(error: Exception, uri: str) -> bool:
    """Return whether an error is transient, so that the operation should be retried."""
    is_remote = "://" in uri and not uri.startswith("file://")
    if not is_remote or _kinds(error).isdisjoint({"OSError"} | _CLIENT_ERRORS):
        return False
    if any(code in str(error.__cause__) for code in _DAMAGED):
        return True
    status = _http_status(error)
    if isinstance(status, int) and 400 <= status < 500 and status not in _PASSING_STATUS:
        return False
    if not _kinds(error).isdisjoint(_LASTING_ERRORS):
        return False
    return getattr(error, "errno", None) not in _LASTING_NUMBERS


def _http_status(error: Exception) -> Any:
    """Return the HTTP status of a client's error; None if it has none."""
    reply = getattr(error, "response", None)
    return (
        getattr(reply, "status_code", None)
        or getattr(error, "status_code", None)
        or getattr(error, "status", None)
    )


def tries_again(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function whose first argument is a URI so that transient errors are retried.

    Errors of object store clients are converted to OSError.
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        uri = str(args[0])
        longest_s = FIRST_PAUSE_S
        end_s = math.inf
        while True:
            try:
                with naming(uri):
                    return function(*args, **kwargs)
            except Exception as error:
                # the pause is random, so that workers that failed together do not retry together
                pause_s = random.uniform(0, longest_s)
                # counted from the first error, because a large file may take longer than PATIENCE_S
                end_s = min(end_s, monotonic() + PATIENCE_S)
                if not _may_pass(error, uri) or monotonic() + pause_s >= end_s:
                    if _kinds(error).isdisjoint(_CLIENT_ERRORS):
                        raise
                    raise OSError(f"{uri}: {error}") from error
            sleep(pause_s)
            longest_s = min(2 * longest_s, LONGEST_PAUSE_S)

    return wrapped


@contextlib.contextmanager
def naming(uri: str) -> Iterator[None]:
    """Add the file's URI to an OSError that does not name its file."""
    try:
        yield
    except OSError as error:
        if error.filename is None and uri not in str(error):
            if error.errno is None:
                error.args = (f"{uri}: {error}",)
            else:
                error.filename = uri
        raise


WRITING = ".writing-"
"""Prefix of the names of temporary folders in which files are written."""
JSON_ERRORS = (json.JSONDecodeError, RecursionError)
"""Errors raised for invalid JSON."""
MAX_JSON_BYTES = 64 * 2**20
"""Limit on the size of JSON files; large tokenizers have tens of megabytes."""


def join(uri: str, *parts: str) -> str:
    """Append path parts to a URI."""
    return "/".join([uri.rstrip("/"), *parts])


def open_filesystem(uri: str) -> tuple[Any, str]:
    """Return the fsspec file system of a URI and the path on it.

    Raises:
        ValueError: the protocol is unknown or its package is not installed.
    """
    # workers request credentials from the metadata service all at once, and some requests fail
    if uri.startswith(("s3://", "s3a://")):
        os.environ.setdefault("AWS_METADATA_SERVICE_NUM_ATTEMPTS", "5")
    known = "a local path, or a URI that fsspec knows, such as s3://bucket/folder"
    packages = (
        "the protocol may need a package (of S3: pip install 's3fs' or ray-surgeon[s3])"
    )
    with refusing(uri, f"give {known}; {packages}", (ImportError, ValueError)):
        filesystem, path = fsspec.core.url_to_fs(uri)
    if "hf" not in filesystem.protocol:  # the Hub's content is pinned to a commit
        filesystem.invalidate_cache()  # another worker may have written files
    return filesystem, path


@tries_again
def exists(uri: str) -> bool:
    """Return whether a file or folder exists."""
    filesystem, path = open_filesystem(uri)
    return bool(filesystem.exists(path))


@tries_again
def facts(uri: str) -> dict[str, Any]:
    """Return fsspec's information on a file, such as its size and its ETag or time."""
    filesystem, path = open_filesystem(uri)
    return dict(filesystem.info(path))


def size_bytes(uri: str) -> int | None:
    """Return the size of a file; None if it does not exist or the server does not report a size."""
    try:
        return facts(uri).get("size")
    except FileNotFoundError:
        return None


@tries_again
def remove_folder(uri: str) -> None:
    """Remove a folder and its content, if it exists."""
    filesystem, path = open_filesystem(uri)
    if filesystem.exists(path):
        filesystem.rm(path, recursive=True)


@tries_again
def remove_files(uri: str, patterns: Sequence[str]) -> None:
    """Remove the files of a folder whose names match a pattern with * or ?.

    Temporary folders left by killed processes are removed, too.
    """
    filesystem, path = open_filesystem(uri)
    for entry in filesystem.ls(path, detail=False) if filesystem.exists(path) else ():
        name = entry.rstrip("/").rpartition("/")[2]
        if name.startswith(WRITING):
            filesystem.rm(entry, recursive=True)
        elif any(fnmatch.fnmatch(name, pattern) for pattern in patterns):
            filesystem.rm_file(entry)


@tries_again
def download(uri: str, target: Path) -> None:
    """Copy a file to a local path."""
    filesystem, path = open_filesystem(uri)
    with naming(str(target)):
        filesystem.get_file(path, str(target))
    _check_whole(target.stat().st_size, filesystem.size(path))


@tries_again
def list_names(uri: str) -> list[str]:
    """Return the sorted names in a folder; a folder that does not exist is empty.

    Temporary folders are left out, and so is the folder itself, which object stores may list.
    """
    filesystem, path = open_filesystem(uri)
    if not filesystem.exists(path):
        return []
    entries = {entry.rstrip("/") for entry in filesystem.ls(path, detail=False)}
    itself = path.rstrip("/")
    if itself in entries and filesystem.isdir(path):
        entries.remove(itself)
    names = (entry.rpartition("/")[2] for entry in entries)
    return sorted(name for name in names if not name.startswith(WRITING))


@tries_again
def list_files(uri: str) -> list[str]:
    """Return the sorted paths of all files below a folder, relative to it; see `list_names`."""
    filesystem, path = open_filesystem(uri)
    root = path.rstrip("/") + "/"
    entries = (entry for entry in filesystem.find(path) if not entry.endswith("/"))
    names = (entry.removeprefix(root) for entry in entries if entry.startswith(root))
    return sorted(
        n for n in names if not any(p.startswith(WRITING) for p in n.split("/"))
    )


@tries_again
def glob(uri: str) -> list[str]:
    """Return the sorted URIs that match a pattern with ``*``, or the URI of one existing file."""
    filesystem, path = open_filesystem(uri)
    paths = (
        filesystem.glob(path) if "*" in path else [path] * bool(filesystem.exists(path))
    )
    return sorted(str(filesystem.unstrip_protocol(match)) for match in paths)


@tries_again
def read_bytes(uri: str) -> bytes:
    """Read a whole file."""
    filesystem, path = open_filesystem(uri)
    content: bytes = filesystem.cat_file(path)
    _check_whole(len(content), filesystem.size(path))
    return content


def _check_whole(num_bytes: int, size: int | None) -> None:
    """Check the number of bytes read against the size of the file; None if it is unknown.

    Raises:
        OSError: they differ.
    """
    if size not in (None, num_bytes):  # web servers may not report the size
        raise OSError(errno.EIO, f"{num_bytes} of {size} bytes came")


def check_size(uri: str, max_bytes: int, what: str) -> None:
    """Check that a file is small enough to be read into memory.

    Raises:
        ValueError: the file has more than `max_bytes`; `what` is the end of the message.
    """
    size = size_bytes(uri)
    if size is not None and size > max_bytes:
        raise ValueError(
            f"{uri}: has {size} bytes, more than the limit of {max_bytes}; {what}"
        )


def read_text(uri: str) -> str:
    """Read a UTF-8 file.

    Raises:
        ValueError: the file is not UTF-8.
    """
    return decoded(read_bytes(uri), f"{uri}:")


def decoded(content: bytes, what: str) -> str:
    """Decode UTF-8; `what` is the beginning of the error message.

    Raises:
        ValueError: the bytes are not UTF-8.
    """
    said = f"{what} not UTF-8 text ({REASON})"
    with refusing(said, "convert the file to UTF-8", UnicodeDecodeError):
        text = content.decode()
    return text


@contextlib.contextmanager
def replacing(uri: str) -> Iterator[Path]:
    """Yield a local path to write to; the file is then moved or uploaded to the URI."""
    filesystem, path = open_filesystem(uri)
    beside = None
    if isinstance(filesystem, LocalFileSystem):
        beside = Path(path).parent
        beside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=beside, prefix=WRITING) as folder:
        yield Path(folder) / "file"
        _upload(uri, Path(folder) / "file")


@tries_again
def _upload(uri: str, source: Path) -> None:
    filesystem, path = open_filesystem(uri)
    if isinstance(filesystem, LocalFileSystem):
        os.replace(source, path)
    else:
        filesystem.put_file(str(source), path)
        _check_whole(filesystem.size(path), source.stat().st_size)


def put_file(uri: str, source: Path) -> None:
    """Copy a local file to a URI atomically."""
    with replacing(uri) as path:
        shutil.copyfile(source, path)


def write_text(uri: str, text: str) -> None:
    """Write a UTF-8 file atomically."""
    with replacing(uri) as path, naming(uri):
        path.write_text(text, encoding="utf-8")


def is_local(uri: str) -> bool:
    """Return whether a URI is a path on a local or mounted file system."""
    return isinstance(open_filesystem(uri)[0], LocalFileSystem)


def append_line(uri: str, line: str) -> None:
    """Append one line to a local text file."""
    _, path = open_filesystem(uri)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with naming(path), open(path, "a", encoding="utf-8") as file:
        file.write(line + "\n")


def read_json(uri: str) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: the file is not valid JSON, or is too large.
    """
    check_size(uri, MAX_JSON_BYTES, "this is no description of a model; fetch it again")
    remedy = "the file is damaged or is another kind of file"
    with refusing(f"{uri}: not valid JSON ({REASON})", remedy, JSON_ERRORS):
        return json.loads(read_text(uri))


def write_json(uri: str, record: object) -> None:
    """Write a record as indented JSON."""
    write_text(uri, json.dumps(record, indent=2) + "\n")


def read_range(uri: str, start: int, end: int) -> bytes:
    """Read the bytes from `start` up to `end`, without a retry; callers use `tries_again`."""
    filesystem, path = open_filesystem(uri)
    content: bytes = filesystem.cat_file(path, start=start, end=end)
    _check_whole(len(content), end - start)
    return content
