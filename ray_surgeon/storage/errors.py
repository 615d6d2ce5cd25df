"""Errors that say which file it is and what to do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

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
