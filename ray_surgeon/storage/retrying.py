"""Retries of operations on object stores, and errors that name their file.

Such stores fail now and then, and runs take hours.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import math
import random
from collections.abc import Callable, Iterator
from time import monotonic, sleep
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

PATIENCE_S = 30.0
"""Seconds for which an operation is retried after its first error that may pass.

Such errors are 500, 503, timeouts, resets and short replies.
"""
FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 5.0
_CLIENT_ERRORS = {"BotoCoreError", "ClientError", "HTTPError", "HttpError", "AzureError"}
"""Names of the errors of clients of object stores that are not OSError."""
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
"""Names of errors of Python and botocore that a retry does not help."""
_LASTING_NUMBERS = {
    errno.EINVAL,
    errno.EPERM,
    errno.ENOSYS,
    errno.EMSGSIZE,
    errno.ENAMETOOLONG,
    errno.ENOSPC,
    errno.EDQUOT,
}
"""Numbers with which s3fs reports that the request itself was refused."""
_PASSING_STATUS = (408, 425, 429)
_DAMAGED = ("IncompleteBody", "BadDigest")
"""Codes with which S3 refuses an upload that was cut or altered on the way.

s3fs reports them as a request that was refused.
"""


def _kinds(error: Exception) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}


def _may_pass(error: Exception, uri: str) -> bool:
    """Whether an operation may succeed when it is tried again."""
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
    """Return the HTTP status that a client's error carries, if there is one."""
    reply = getattr(error, "response", None)
    return (
        getattr(reply, "status_code", None)
        or getattr(error, "status_code", None)
        or getattr(error, "status", None)
    )


def tries_again(function: Callable[P, T]) -> Callable[P, T]:
    """Let a function of a URI try again after errors that may pass.

    It raises OSError whatever the client of a store raises.
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
                # random pauses, because workers that failed together should not come back together
                pause_s = random.uniform(0, longest_s)
                # not from the start: a large file alone may take longer than the patience
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
