"""Numbers as people write them: percentages, and counts with a suffix."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

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
