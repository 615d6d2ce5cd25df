"""The base of all sections of a job spec, and errors as sentences for users."""

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
"""Placeholder in a message for the text of an error, see `refusing`."""
_LONGEST_REASON = 500
"""The most characters of an error's text in a message."""


@contextlib.contextmanager
def refusing(what: str, remedy: str, kinds: Errors = OSError) -> Iterator[None]:
    """Turn an error into a ValueError for the user.

    Args:
        what: says which thing cannot be used, and where; may hold `REASON` where the text of the
            error belongs, which is otherwise added at the end.
        remedy: advice for the user.
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
    """Return a path object as text, and any other value unchanged.

    Raises:
        ValueError: the path was a URI, whose two slashes a Path turns into one.
    """
    if not isinstance(value, os.PathLike):
        return value
    path = os.fspath(value)
    if re.match("[a-z][a-z0-9+.-]+:/", path):
        raise ValueError(f"{path} was a URI before it became a path; give URIs as text")
    return path


def absolute(uri: str) -> str:
    """Return the absolute path of a local path, and any other URI unchanged.

    Workers run in other folders, so relative paths would have another meaning there.
    """
    if "://" in uri:
        return uri
    path = os.path.expanduser(uri)
    if path.startswith("~"):
        raise ValueError(f"{uri} names no home directory of this machine; write the path out")
    return os.path.realpath(path)


_Text = Annotated[str, Field(min_length=1)]
Address = Annotated[_Text, BeforeValidator(local_path), AfterValidator(_without_secrets)]
"""A path, URI or Hub id, shown in the run's records."""
Place = Annotated[Address, AfterValidator(absolute)]
"""A path or URI; a local path becomes absolute."""


class Section(pydantic.BaseModel):
    """Settings shared by all sections: frozen, and a field that does not exist is refused.

    The docstring below a field is its description, in `ray-surgeon schema` and in the docs.
    """

    model_config = pydantic.ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        hide_input_in_errors=True,
        use_attribute_docstrings=True,
    )
    is_checked: ClassVar[bool] = False  # whether its stage measures itself on windows held aside

    def problems(self) -> Iterable[str]:
        """Yield conflicts between fields that are valid by themselves.

        Each is a sentence with the remedy. The first becomes the section's error; those of base
        classes are found first, so that a class need not yield them again.
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
        if not isinstance(fields, dict):
            return None
        return tag(str(tag_of(fields.get)))

    return Discriminator(find, "no_such_section", f"expected {expected}")


_S = TypeVar("_S")
OrAuto = Annotated[
    Annotated[_S, Tag(tag("section"))] | Annotated[Literal["auto"], Tag(tag("auto"))],
    Discriminator(lambda value: tag("auto") if isinstance(value, str) else tag("section")),
]
"""A section or the word auto; errors refer to the one that was given."""
