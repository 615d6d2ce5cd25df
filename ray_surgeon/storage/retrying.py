"""Retries of operations on object stores.

Such stores fail now and then, and runs take hours.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import sys
from collections.abc import Callable, Iterator
from time import monotonic, sleep
from typing import ParamSpec, TypeVar

import tenacity

P = ParamSpec("P")
T = TypeVar("T")

PATIENCE_S = 30.0
"""Seconds for which an operation is retried after its first error that may pass.

Such errors are 500, 503, timeouts, resets and short replies.
"""
FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 5.0
_LASTING_ERRORS = (
    FileNotFoundError,
    PermissionError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
)
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

_CLIENTS = {
    "botocore.exceptions": ("BotoCoreError", "ClientError"),
    "aiohttp": ("ClientError",),
    "httpx": ("HTTPError",),
    "gcsfs.retry": ("HttpError",),
    "azure.core.exceptions": ("AzureError",),
}
_PASSING_STATUS = (408, 425, 429)
_DAMAGED = ("IncompleteBody", "BadDigest")
"""What S3 says of an upload that was cut or altered on the way; s3fs makes a refused request of it.
"""


def _client_errors() -> tuple[type[Exception], ...]:
    """Return the errors of clients of object stores that are not OSError.

    A client that is not loaded has none.
    """
    errors: list[type[Exception]] = []
    for module, names in _CLIENTS.items():
        if module in sys.modules:
            errors += [getattr(sys.modules[module], name) for name in names]
    return tuple(errors)


def _may_pass(error: BaseException, uri: str) -> bool:
    """Whether an operation may succeed when it is tried again."""
    lasting_names = (
        "NoCredentialsError",
        "PartialCredentialsError",
        "ParamValidationError",
        "ProfileNotFound",
        "NoRegionError",
    )
    is_local = "://" not in uri or uri.startswith("file://")
    if not is_local and any(code in str(error.__cause__) for code in _DAMAGED):
        return True
    if is_local or isinstance(error, _LASTING_ERRORS):
        return False
    reply = getattr(error, "response", None)
    status = (
        getattr(reply, "status_code", None)
        or getattr(error, "status_code", None)
        or getattr(error, "status", None)
    )
    if isinstance(status, int) and 400 <= status < 500 and status not in _PASSING_STATUS:
        return False
    return (
        type(error).__name__ not in lasting_names
        and getattr(error, "errno", None) not in _LASTING_NUMBERS
    )


@contextlib.contextmanager
def naming(uri: str) -> Iterator[None]:
    """Let an OSError that does not say of which file it is say so."""
    try:
        yield
    except OSError as error:
        if error.filename is None and uri not in str(error):
            if error.errno is None:
                error.args = (f"{uri}: {error}",)
            else:
                error.filename = uri
        raise


def tries_again(function: Callable[P, T]) -> Callable[P, T]:
    """Let a function of a URI try again after errors that may pass.

    It raises OSError whatever the client raises.
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        uri = str(args[0])
        first_failure_s: list[float] = []

        def may_pass(error: BaseException) -> bool:
            return isinstance(error, (OSError, *_client_errors())) and _may_pass(error, uri)

        def is_patience_over(state: tenacity.RetryCallState) -> bool:
            # not the start: a large file alone may take longer than the patience
            if not first_failure_s:
                first_failure_s.append(monotonic())
            return monotonic() - first_failure_s[0] + state.upcoming_sleep >= PATIENCE_S

        again = tenacity.Retrying(
            retry=tenacity.retry_if_exception(may_pass),
            stop=is_patience_over,
            # random pauses, because workers that failed together should not come back together
            wait=tenacity.wait_random_exponential(multiplier=FIRST_PAUSE_S, max=_LONGEST_PAUSE_S),
            sleep=sleep,
            reraise=True,
        )
        try:
            with naming(uri):
                return again(function, *args, **kwargs)
        except _client_errors() as error:
            raise OSError(f"{uri}: {error}") from error

    return wrapped
