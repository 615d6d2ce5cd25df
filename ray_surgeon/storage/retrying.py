"""Retries of operations on object stores, and errors as sentences.

Such stores fail now and then, and runs take hours.
"""

from __future__ import annotations

import contextlib
import errno
import functools
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
_WRONG_KIND = (IsADirectoryError, NotADirectoryError)
_LASTING_ERRORS = (FileNotFoundError, PermissionError, FileExistsError, *_WRONG_KIND)
_LASTING_NAMES = {"NoCredentialsError", "PartialCredentialsError", "ParamValidationError"}
_LASTING_NAMES |= {"ProfileNotFound", "NoRegionError"}
"""Errors of botocore."""
_LASTING_NUMBERS = {errno.EINVAL, errno.EPERM, errno.ENOSYS, errno.EMSGSIZE, errno.ENAMETOOLONG}
_LASTING_NUMBERS |= {errno.ENOSPC, errno.EDQUOT}
"""Numbers with which s3fs reports that the request itself was refused."""
_CLIENT_ERRORS = {("botocore", "BotoCoreError"), ("botocore", "ClientError")}
_CLIENT_ERRORS |= {("aiohttp", "ClientError"), ("httpx", "HTTPError")}
_CLIENT_ERRORS |= {("gcsfs", "HttpError"), ("azure", "AzureError")}
"""Package and name of the errors of clients of object stores that are not OSError."""
_PASSING_STATUS = (408, 425, 429)
_DAMAGED = ("IncompleteBody", "BadDigest")
"""What S3 says of an upload that was cut or altered on the way; s3fs makes a refused request of it.
"""


def _is_of_a_client(error: BaseException) -> bool:
    kinds = {(kind.__module__.partition(".")[0], kind.__name__) for kind in type(error).__mro__}
    return not kinds.isdisjoint(_CLIENT_ERRORS)


def _may_pass(error: BaseException, uri: str) -> bool:
    """Whether an operation may succeed when it is tried again."""
    is_remote = "://" in uri and not uri.startswith("file://")
    if not is_remote or not (isinstance(error, OSError) or _is_of_a_client(error)):
        return False
    if any(code in str(error.__cause__) for code in _DAMAGED):
        return True
    reply = getattr(error, "response", None)
    places = ((reply, "status_code"), (error, "status_code"), (error, "status"))
    status = next(filter(None, (getattr(place, name, None) for place, name in places)), None)
    if isinstance(status, int) and 400 <= status < 500 and status not in _PASSING_STATUS:
        return False
    lasts = isinstance(error, _LASTING_ERRORS) or type(error).__name__ in _LASTING_NAMES
    return not lasts and getattr(error, "errno", None) not in _LASTING_NUMBERS


def tries_again(function: Callable[P, T]) -> Callable[P, T]:
    """Let a function of a URI try again after errors that may pass.

    It raises OSError whatever the client raises.
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        uri = str(args[0])
        first_failure_s: list[float] = []

        def is_patience_over(state: tenacity.RetryCallState) -> bool:
            # not the start: a large file alone may take longer than the patience
            if not first_failure_s:
                first_failure_s.append(monotonic())
            return monotonic() - first_failure_s[0] + state.upcoming_sleep >= PATIENCE_S

        again = tenacity.Retrying(
            retry=tenacity.retry_if_exception(lambda error: _may_pass(error, uri)),
            stop=is_patience_over,
            # random pauses, because workers that failed together should not come back together
            wait=tenacity.wait_random_exponential(multiplier=FIRST_PAUSE_S, max=_LONGEST_PAUSE_S),
            sleep=sleep,
            reraise=True,
        )
        try:
            with naming(uri):
                return again(function, *args, **kwargs)
        except Exception as error:
            if not _is_of_a_client(error):
                raise
            raise OSError(f"{uri}: {error}") from error

    return wrapped


Errors = type[Exception] | tuple[type[Exception], ...]

REASON = "{reason}"
"""Stands in a message for what an error says, see `refusing`."""


@contextlib.contextmanager
def refusing(what: str, remedy: str, kinds: Errors = OSError) -> Iterator[None]:
    """Turn an error into a ValueError for the user.

    Args:
        what: cannot be used, and where that was wanted; has `REASON` where the words of the error
            belong, if that is not at its end.
        remedy: what the user can do.
        kinds: of errors.
    """
    try:
        yield
    except kinds as error:
        said = what if REASON in what else f"{what}: {REASON}"
        raise ValueError(f"{said}; {remedy}".replace(REASON, str(error))) from error


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
