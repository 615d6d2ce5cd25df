"""What all sections of a job spec have in common, and errors as sentences for users."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import pydantic
from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag

Errors = type[Exception] | tuple[type[Exception], ...]

REASON = "{reason}"
"""Stands in a message for what an error says, see `refusing`."""
_LONGEST_REASON = 500
"""Characters of it, at most."""


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
        reason = " ".join(str(error).split())[:_LONGEST_REASON] or type(error).__name__
        raise ValueError(f"{said}; {remedy}".replace(REASON, reason)) from error


Positive = Annotated[int, Field(gt=0)]

_SECRETS = re.compile(
    r"(?i)https?://[^/]*@|://[^/@]*:[^/@]*@"
    r"|[?&][^=&]*(?:signature|token|secret|password|credential|api_?key|auth|sig)="
)


def _without_secrets(uri: str) -> str:
    if _SECRETS.search(uri):
        raise ValueError("holds credentials; give them to the file system, see docs/clusters.md")
    return uri


def local_path(value: Any) -> Any:
    """Return a path as text, and what is none as it is.

    Raises:
        ValueError: it was a URI, whose two slashes a Path makes one.
    """
    path = os.fspath(value) if isinstance(value, os.PathLike) else value
    if path is not value and re.match("[a-z][a-z0-9+.-]+:/", path):
        raise ValueError(f"{path} was a URI before it became a path; give URIs as text")
    return path


def absolute(uri: str) -> str:
    """Return a local path whole, as workers run in other folders, and any other URI as it is."""
    if "://" in uri:
        return uri
    path = os.path.expanduser(uri)
    if path.startswith("~"):
        raise ValueError(f"{uri} names no home directory of this machine; write the path out")
    return os.path.realpath(path)


_Text = Annotated[str, Field(min_length=1)]
Address = Annotated[_Text, BeforeValidator(local_path), AfterValidator(_without_secrets)]
"""A path, URI or Hub id, which the run's records show."""
Place = Annotated[Address, AfterValidator(absolute)]
"""A path or URI; a local path becomes a whole one."""


class Section(pydantic.BaseModel):
    """Settings shared by all sections: frozen, and a field that does not exist is refused.

    The docstring below a field is its description, in `ray-surgeon schema` and in the docs.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    model_config |= {"hide_input_in_errors": True, "use_attribute_docstrings": True}
    is_checked: ClassVar[bool] = False  # whether its stage measures itself on windows held aside

    def problems(self) -> Iterable[str]:
        """Yield what fields that are right by themselves have against each other.

        Each is a sentence with the remedy. The first becomes the section's error; those of base
        classes come before a class's own, which need not yield them.
        """
        return ()

    @pydantic.model_validator(mode="after")
    def _has_no_problems(self) -> Section:
        for section in reversed(type(self).__mro__):
            for problem in vars(section).get("problems", Section.problems)(self):
                raise ValueError(problem)
        return self


def tag(name: str) -> str:
    """Return a tag of a union; the angle brackets keep it apart from names of fields in errors."""
    return f"<{name}>"


def by_tag(tag_of: Callable[[Any], str | None], expected: str) -> Discriminator:
    """Return a discriminator for a union of sections, given as mappings or as sections.

    Args:
        tag_of: takes a function (field, default) -> value, and returns the tag's name, or None if
            there is no such section.
        expected: what the fields may be, for the error.
    """

    def find(value: Any) -> str | None:
        fields = vars(value) if isinstance(value, Section) else value
        return tag(str(tag_of(fields.get))) if isinstance(fields, dict) else None

    return Discriminator(find, "no_such_section", f"expected {expected}")


_S = TypeVar("_S")
OrAuto = Annotated[
    Annotated[_S, Tag(tag("section"))] | Annotated[Literal["auto"], Tag(tag("auto"))],
    Discriminator(lambda value: tag("auto") if isinstance(value, str) else tag("section")),
]
"""A section or the word auto; errors are of the one that was meant."""
