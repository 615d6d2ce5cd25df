"""Operations on object stores are tried again for a while, because such stores fail now and then and runs take hours."""

from __future__ import annotations

import errno
import functools
import math
import random
import sys
from collections.abc import Callable
from time import monotonic, sleep
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

PATIENCE_S = 30.0
"""How long an operation on an object store is tried again after errors that may pass: 500, 503, timeouts, resets, short replies."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 5.0
_LASTING_ERRORS = (FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError)
_LASTING_NUMBERS = {errno.EINVAL, errno.EPERM, errno.ENOSYS, errno.EMSGSIZE, errno.ENAMETOOLONG, errno.ENOSPC, errno.EDQUOT}
"""What s3fs makes of refusals of a request itself."""


_CLIENTS = {
    "botocore.exceptions": ("BotoCoreError", "ClientError"),
    "aiohttp": ("ClientError",),
    "httpx": ("HTTPError",),
    "gcsfs.retry": ("HttpError",),
    "azure.core.exceptions": ("AzureError",),
}
_PASSING_STATUS = (408, 425, 429)


def _client_errors() -> tuple[type[Exception], ...]:
    """Return the errors of clients of object stores that are not OSError; none of a client that is not loaded."""
    found: list[type[Exception]] = []
    for module, names in _CLIENTS.items():
        if module in sys.modules:
            found += [getattr(sys.modules[module], name) for name in names]
    return tuple(found)


def _may_pass(error: Exception, uri: str) -> bool:
    """Whether an operation may succeed when it is tried again."""
    lasting_names = ("NoCredentialsError", "PartialCredentialsError", "ParamValidationError", "ProfileNotFound", "NoRegionError")
    is_local = "://" not in uri or uri.startswith("file://")
    if is_local or isinstance(error, _LASTING_ERRORS):
        return False
    reply = getattr(error, "response", None)
    status = getattr(reply, "status_code", None) or getattr(error, "status_code", None) or getattr(error, "status", None)
    if isinstance(status, int) and 400 <= status < 500 and status not in _PASSING_STATUS:
        return False
    return type(error).__name__ not in lasting_names and getattr(error, "errno", None) not in _LASTING_NUMBERS


def tries_again(function: Callable[P, T]) -> Callable[P, T]:
    """Let a function that takes a URI first try again after errors that may pass, and raise OSError for whatever the client raises."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        first_failure, pause = math.inf, _FIRST_PAUSE_S
        while True:
            try:
                return function(*args, **kwargs)
            except Exception as error:
                if not isinstance(error, (OSError, *_client_errors())):
                    raise
                uri = str(args[0])
                first_failure = min(first_failure, monotonic())  # not the start: a large file alone takes longer than the patience
                if _may_pass(error, uri) and monotonic() - first_failure + pause < PATIENCE_S:
                    sleep(pause * random.uniform(0.5, 1.0))  # workers that failed together should not come back together
                    pause = min(2 * pause, _LONGEST_PAUSE_S)
                elif isinstance(error, OSError):
                    raise
                else:
                    raise OSError(f"{uri}: {error}") from error

    return wrapped
