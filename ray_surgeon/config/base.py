"""The base class of all sections of a job spec, their numbers and paths, and error messages."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from decimal import Decimal
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import pydantic
from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag

from ray_surgeon.errors import ConfigError

Errors = type[Exception] | tuple[type[Exception], ...]

REASON = "{reason}"
"""Placeholder for the text of an error in a message; see `refusing`."""
_LONGEST_REASON = 500
"""Maximum number of characters of an error's text in a message."""


@contextlib.contextmanager
def refusing(what: str, remedy: str, kinds: Errors = OSError) -> Iterator[None]:
    """Convert an error into a ValueError for the user.

    Args:
        what: the problem: which input cannot be used, and where it is. The text of the error is
            inserted at `REASON`, or appended if `what` does not contain it.
        remedy: advice for the user.
        kinds: types of the errors to convert.

    Raises:
        ValueError: the block raised such an error.
    """
    try:
        yield
    except kinds as error:
        problem = what
        if REASON not in what:
            problem = f"{what}: {REASON}"
        reason = " ".join(str(error).split())[:_LONGEST_REASON] or type(error).__name__
        raise ValueError(f"{problem}; {remedy}".replace(REASON, reason)) from error


Positive = Annotated[int, Field(gt=0)]

_SECRETS = re.compile(
    r"(?i)https?://[^/]*@|://[^/@]*:[^/@]*@"
    r"|[?&][^=&]*(?:signature|token|secret|password|credential|api_?key|auth|sig)="
)


def _without_secrets(uri: str) -> str:
    if _SECRETS.search(uri):
        raise ValueError(
            "holds credentials; give them to the file system, see docs/clusters.md"
        )
    return uri


def local_path(value: Any) -> Any:
    """Return a path object as text, and any other value unchanged.

    Raises:
        ValueError: the path was made from a URI, in which `pathlib` merges the two slashes.
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
        raise ValueError(
            f"{uri} names no home directory of this machine; write the path out"
        )
    return os.path.realpath(path)


_Text = Annotated[str, Field(min_length=1)]
Address = Annotated[_Text, BeforeValidator(local_path), AfterValidator(_without_secrets)]
"""A path, URI or Hub id; the run's records show it, so it must not contain credentials."""
Location = Annotated[Address, AfterValidator(absolute)]
"""A path or URI; a local path becomes absolute."""


class Section(pydantic.BaseModel):
    """Base class of all sections: frozen; an unknown field is an error.

    The docstring below a field is its description, in `ray-surgeon schema` and in the docs.
    """

    model_config = pydantic.ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        hide_input_in_errors=True,
        use_attribute_docstrings=True,
    )
    # whether the stage that the section configures is measured on windows held aside
    is_checked: ClassVar[bool] = False

    def problems(self) -> Iterable[ConfigError]:
        """Yield conflicts between individually valid fields.

        The first one becomes the section's error. Conflicts of base classes are found first, so a
        subclass need not yield them again.
        """
        return ()

    @pydantic.model_validator(mode="after")
    def _has_no_problems(self) -> Section:
        for section in reversed(type(self).__mro__):
            for problem in vars(section).get("problems", Section.problems)(self):
                raise problem
        return self


def tag(name: str) -> str:
    """Return a tag of a union, in angle brackets to distinguish it from field names in errors."""
    return f"<{name}>"


def by_tag(tag_of: Callable[[Any], str | None], expected: str) -> Discriminator:
    """Return a discriminator for a union of sections, given as mappings or as sections.

    Args:
        tag_of: receives a function (field, default) -> value, and returns the tag's name, or None
            if no section of the union matches.
        expected: the allowed fields, for the error.
    """

    def find(value: Any) -> str | None:
        fields = value
        if isinstance(value, Section):
            fields = vars(value)
        if not isinstance(fields, dict):
            return None
        return tag(str(tag_of(fields.get)))

    return Discriminator(find, "no_such_section", f"expected {expected}")


_S = TypeVar("_S")
OrAuto = Annotated[
    Annotated[_S, Tag(tag("section"))] | Annotated[Literal["auto"], Tag(tag("auto"))],
    Discriminator(
        lambda value: tag("auto") if isinstance(value, str) else tag("section")
    ),
]
"""A section or the word auto; errors mention only the given alternative."""


_FACTORS = {
    "k": 10**3,
    "m": 10**6,
    "b": 10**9,
    "g": 10**9,
    "t": 10**12,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
"""Suffix in lower case -> its factor."""
_DIGITS = r"[0-9]{1,15}(?:\.[0-9]{1,15})?"
_PERCENT = rf"({_DIGITS}) ?%"
_COUNT = rf"({_DIGITS}) ?([kKMBGT])"
_BYTES = rf"({_DIGITS}) ?([kKMGT]i?B)"


def fraction(value: Any) -> Any:
    """Return a percentage such as 30% as the fraction 0.3; other values are checked later.

    Raises:
        ValueError: the percentage is not between 0 and 100, a number is a percentage without its
            sign, or a text is neither.
    """
    if isinstance(value, str):
        text = value.strip()
        if re.fullmatch(_DIGITS, text):
            return value
        found = re.fullmatch(_PERCENT, text)
        if found is None:
            raise ValueError(
                f"expected a fraction or a percentage, 0.3 or 30% (got {value[:80]!r}); a size "
                "is given by target, such as {parameters: 6M}"
            )
        percent = Decimal(found[1])
        if not 0 < percent < 100:
            raise ValueError(
                f"expected more than 0% and less than 100%, such as 30% (got {value!r})"
            )
        return float(percent / 100)
    if isinstance(value, int | float) and 1 < value < 100:
        raise ValueError(
            f"expected a fraction below 1, or a percentage: {value / 100:g} or "
            f"{value:g}% (got {value!r})"
        )
    return value


def count(value: Any) -> Any:
    """Return a number such as 6M or 100k as 6,000,000 or 100,000; others are checked later.

    Raises:
        ValueError: it is not whole.
    """
    return _with_suffix(value, _COUNT, "6M or 100k")


def num_bytes(value: Any) -> Any:
    """Return a size such as 2GB or 1.5GiB in bytes; other values are checked later.

    Raises:
        ValueError: it is not whole.
    """
    return _with_suffix(value, _BYTES, "2GB or 1.5GiB")


def _with_suffix(value: Any, pattern: str, example: str) -> Any:
    if not isinstance(value, str):
        return value
    text = value.strip()
    if re.fullmatch(_DIGITS, text.replace("_", "")):
        return value
    found = re.fullmatch(pattern, text)
    if found is None:
        raise ValueError(f"expected a number, such as {example} (got {value[:80]!r})")
    number = Decimal(found[1]) * _FACTORS[found[2].lower()]
    if number != int(number):
        raise ValueError(f"expected a whole number, such as {example} (got {value!r})")
    return int(number)


def size(value: Any) -> Any:
    """Return a sparsity such as 30%, or a size such as 6M or 2GB, as a number."""
    if isinstance(value, str):
        text = value.strip()
        if text.endswith("%"):
            return fraction(text)
        if text.endswith("B") and re.fullmatch(_BYTES, text):
            return num_bytes(text)
        return count(text)
    return value


_Percent = Annotated[str, Field(pattern=f"^{_PERCENT}$")]
_Suffixed = Annotated[str, Field(pattern=f"^{_COUNT}$")]
_SuffixedBytes = Annotated[str, Field(pattern=f"^{_BYTES}$")]
_Open = Annotated[float, Field(gt=0, lt=1)]
_Whole = Annotated[int, Field(gt=0)]
_NotNegative = Annotated[int, Field(ge=0)]
_More = Annotated[float, Field(gt=0)]

Fraction = Annotated[
    _Open, BeforeValidator(fraction, json_schema_input_type=_Open | _Percent)
]
"""A fraction between 0 and 1, or a percentage."""
Count = Annotated[
    _Whole, BeforeValidator(count, json_schema_input_type=_Whole | _Suffixed)
]
"""A positive whole number, or one with a suffix: k, M, B (or G) and T."""
CountOrZero = Annotated[
    _NotNegative,
    BeforeValidator(count, json_schema_input_type=_NotNegative | _Suffixed),
]
"""A whole number, or one with a suffix."""
NumBytes = Annotated[
    _Whole, BeforeValidator(num_bytes, json_schema_input_type=_Whole | _SuffixedBytes)
]
"""A number of bytes, or a size with a unit: kB, MB, GB, TB, KiB, MiB, GiB, TiB."""
Size = Annotated[
    _More,
    BeforeValidator(
        size,
        json_schema_input_type=_More | _Percent | _Suffixed | _SuffixedBytes,
    ),
]
"""A sparsity, or the size of a model in the unit of a target."""
