"""Job specs as text: YAML, overrides, and error messages."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from ray_surgeon.config.base import REASON, refusing
from ray_surgeon.config.job import JobSpec
from ray_surgeon.errors import ConfigError

_YAML_ERRORS = (yaml.YAMLError, RecursionError, ValueError, LookupError, AttributeError)
"""Errors of PyYAML, and of its constructors for values that do not match their tags."""


class _Loader(yaml.SafeLoader):
    """YAML's safe loader with an error for a repeated key, of which YAML would use the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Any:
        """Return a mapping."""
        earlier = []
        for key, _ in node.value:
            if key.value in earlier and key.value != "<<":
                problem = f"{key.value} is given twice; remove one"
                raise yaml.constructor.ConstructorError(
                    None, None, problem, key.start_mark
                )
            earlier.append(key.value)
        return super().construct_mapping(node, deep)


def parse_spec(text: str, overrides: Sequence[str] = ()) -> JobSpec:
    """Parse a job spec.

    Args:
        text: YAML or JSON.
        overrides: each ``section.field=value`` with a YAML value; list items by number, e.g.
            ``evaluation.0.num_sequences=8``.

    Raises:
        ValueError: the text is not YAML, or an override is malformed.
        pydantic.ValidationError: a field is wrong.
    """
    with refusing(
        "the job spec is not valid YAML", "see the files in pipelines/", _YAML_ERRORS
    ):
        document = yaml.load(text, _Loader)
    if not isinstance(document, dict):
        raise ValueError(
            "the job spec must be a mapping of sections; see the files in pipelines/"
        )
    for override in overrides:
        _apply_override(document, override)
    return JobSpec.model_validate(document)


def _apply_override(document: dict[str, Any], override: str) -> None:
    path, equals, value = override.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        raise ValueError(
            f"--set {override}: expected section.field=value, e.g. name=test"
        )
    remedy = f"put it into quotes, as in '{path}=\"{value}\"'"
    with refusing(
        f"--set {override}: the value is no YAML ({REASON})", remedy, _YAML_ERRORS
    ):
        content = yaml.safe_load(value)
    texts = document.get("evaluation")
    is_item = len(keys) > 1 and keys[1].isdecimal()
    if keys[0] == "evaluation" and isinstance(texts, list) and not is_item:
        document["evaluation"] = {"texts": texts}  # the long form of a list
    place: Any = document
    for number, key in enumerate(keys):
        at = _place_in(
            place, key, where=f"--set {override}: {'.'.join(keys[:number])} is"
        )
        if number == len(keys) - 1:
            place[at] = content
        elif isinstance(place, dict) and place.get(at) is None:
            # absent, or switched off by null
            place[at] = {}
        place = place[at]


def _place_in(container: Any, key: str, where: str) -> str | int:
    """Return a key of a mapping, or the index of an item of a list."""
    if isinstance(container, dict):
        return key
    if not isinstance(container, list):
        raise ValueError(f"{where} {container!r}, which has no fields; set it itself")
    if not key.isdecimal() or int(key) not in range(len(container)):
        last = len(container) - 1
        raise ValueError(
            f"{where} a list with items 0 to {last}, and {key!r} is none of them"
        )
    return int(key)


_LIST = "expected a list, such as [a, b]"
_FIELDS = "expected fields, such as {name: value}"
_SENTENCES = {
    "missing": "is missing; add it, `ray-surgeon schema` describes it",
    "tuple_type": _LIST,
    "list_type": _LIST,
    "model_type": _FIELDS,
    "model_attributes_type": _FIELDS,
    "dict_type": _FIELDS,
    "int_parsing": "expected a whole number, written out",
    "float_parsing": "expected a number; an exponent needs a point and a sign, as in 1.0e+8",
}
"""Type of a pydantic error -> its message for people who write YAML."""


def validation_message(
    error: ValidationError, origin: str, derived: Sequence[str] = ()
) -> str:
    """Return a message about an invalid job spec: one line per field, with the remedy.

    Args:
        error: of `JobSpec`.
        origin: of the spec.
        derived: sections that were made from others; their errors are left out if others have any.
    """
    lines = [f"{origin} is not a valid job spec:"]
    problems = error.errors(include_url=False)
    for problem in problems:
        others = [another["loc"] for another in problems if another is not problem]
        if not _follows(problem, others, derived):
            lines.append(_line(problem))
    return "\n".join(lines)


def _follows(
    problem: ErrorDetails, others: Sequence[tuple[int | str, ...]], derived: Sequence[str]
) -> bool:
    """Whether an error is only a consequence of errors at other places."""
    kind = problem["type"]
    place = problem["loc"]
    if kind == "default_factory_not_called":
        return True
    # a list is also too short if one of its items is wrong
    if kind == "too_short" and any(loc[: len(place)] == place for loc in others):
        return True
    made = [(section,) for section in derived]
    return place[:1] in made and any(loc[:1] not in made for loc in others)


def _near_name(names: Sequence[str]) -> str | None:
    """Return the field whose name is most like the last one of a path, in the same section."""
    from ray_surgeon.config.reference import sections_below

    named = [name for name in names if not name.isdecimal()]
    if not named:
        return None
    *path, wrong = named
    schema = JobSpec.model_json_schema()
    sections: list[Mapping[str, Any]] = [schema]
    for name in path:
        sections = list(sections_below(schema, sections, name))
    known = set[str]()
    for section in sections:
        known.update(section.get("properties", {}))
    near = difflib.get_close_matches(wrong, sorted(known), n=1)
    return near[0] if near else None


def _line(problem: ErrorDetails) -> str:
    kind = problem["type"]
    names = []
    tags = []
    for part in map(str, problem["loc"]):
        if part.startswith("<"):
            tags.append(part[1:-1])
        else:
            names.append(part)
    error = problem.get("ctx", {}).get("error")
    if isinstance(error, ConfigError):
        names.append(error.field)
        return f"  {'.'.join(names)}: {error.found}; {error.remedy}"
    message = _SENTENCES.get(kind, problem["msg"].removeprefix("Value error, "))
    if kind not in ("missing", "value_error"):
        got = f" (got {reprlib.repr(problem['input'])[:80]})"
    else:
        got = ""
    if kind == "extra_forbidden":
        message = f"is not an option of {tags[-1]}" if tags else "is not an option"
        near = _near_name(names)
        if near:
            got += f"; do you mean {near}?"
        else:
            got += (
                "; remove it or correct its name, `ray-surgeon schema` lists the fields"
            )
    return f"  {'.'.join(names) or 'spec'}: {message}{got}"
