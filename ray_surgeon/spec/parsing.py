"""Job specs as text: YAML, overrides, and what is wrong with them in words."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import Any

import yaml
from pydantic import ValidationError

from ray_surgeon.spec.base import REASON, refusing
from ray_surgeon.spec.job import JobSpec

_YAML_ERRORS = (yaml.YAMLError, RecursionError, ValueError, LookupError, AttributeError)
"""PyYAML lets through what its constructors raise on values that do not fit their tags."""


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which refuses a key that is given twice: the last one would win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Any:
        """Return a mapping."""
        names = [key.value for key, _ in node.value]
        for number, (key, _) in enumerate(node.value):
            if key.value in names[:number] and key.value != "<<":
                problem = f"{key.value} is given twice; remove one"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
        return super().construct_mapping(node, deep)


def parse_spec(text: str, overrides: Sequence[str] = ()) -> JobSpec:
    """Parse a job spec.

    Args:
        text: YAML or JSON.
        overrides: ``section.field=value`` each, the value being YAML; list items by number, e.g.
            ``evaluation.0.num_sequences=8``.

    Raises:
        ValueError: it is not YAML, or an override is malformed.
        pydantic.ValidationError: a field is wrong.
    """
    with refusing("the job spec is not valid YAML", "see the files in pipelines/", _YAML_ERRORS):
        document = yaml.load(text, _Loader)
    if not isinstance(document, dict):
        raise ValueError("the job spec must be a mapping of sections; see the files in pipelines/")
    for override in overrides:
        _apply_override(document, override)
    return JobSpec.model_validate(document)


def _apply_override(document: dict[str, Any], override: str) -> None:
    path, equals, value = override.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        raise ValueError(f"--set {override}: expected section.field=value, e.g. name=test")
    remedy = f"put it into quotes, as in '{path}=\"{value}\"'"
    with refusing(f"--set {override}: the value is no YAML ({REASON})", remedy, _YAML_ERRORS):
        content = yaml.safe_load(value)
    texts = document.get("evaluation")
    if keys[0] == "evaluation" and isinstance(texts, list) and not "".join(keys[1:2]).isdecimal():
        document["evaluation"] = {"texts": texts}  # for which a list is short
    place: Any = document
    for number, key in enumerate(keys):
        where = f"--set {override}: {'.'.join(keys[:number])} is"
        if not isinstance(place, dict | list):
            raise ValueError(f"{where} {place!r}, which has no fields; set it itself")
        at: Any = int(key) if isinstance(place, list) and key.isdecimal() else key
        if isinstance(place, list) and at not in range(len(place)):
            last = len(place) - 1
            raise ValueError(f"{where} a list with items 0 to {last}, and {key!r} is none of them")
        if number == len(keys) - 1:
            place[at] = content
        elif isinstance(place, dict) and place.get(at) is None:  # absent, or switched off by null
            place[at] = {}
        place = place[at]


_FIELDS = "expected fields, such as {name: value}"
_SENTENCES = {
    "missing": "is missing; add it, `ray-surgeon schema` describes it",
    **dict.fromkeys(("tuple_type", "list_type"), "expected a list, such as [a, b]"),
    **dict.fromkeys(("model_type", "model_attributes_type", "dict_type"), _FIELDS),
    "int_parsing": "expected a whole number, written out",
    "float_parsing": "expected a number; an exponent needs a point and a sign, as in 1.0e+8",
}
"""Type of an error of pydantic's -> what it means to people who write YAML."""


def validation_message(error: ValidationError, origin: str, derived: Sequence[str] = ()) -> str:
    """Return what is wrong with a job spec: a line a field, with the remedy.

    Args:
        error: of `JobSpec`.
        origin: of the spec.
        derived: sections that were made of others; what is wrong with them follows.
    """
    lines = [f"{origin} is not a valid job spec:"]
    problems = error.errors(include_url=False)
    made = [(section,) for section in derived]
    for problem in problems:
        kind = problem["type"]
        place = problem["loc"]
        others = [another["loc"] for another in problems if another is not problem]
        # a list is also short of an item that is wrong itself
        is_short = kind == "too_short" and any(loc[: len(place)] == place for loc in others)
        follows = place[:1] in made and any(loc[:1] not in made for loc in others)
        if is_short or follows or kind == "default_factory_not_called":
            continue
        parts = [str(part) for part in place]
        tags = [part[1:-1] for part in parts if part.startswith("<")]
        path = ".".join(part for part in parts if not part.startswith("<")) or "spec"
        message = _SENTENCES.get(kind, problem["msg"].removeprefix("Value error, "))
        shows_value = kind not in ("missing", "value_error")
        got = f" (got {reprlib.repr(problem['input'])[:80]})" if shows_value else ""
        if kind == "extra_forbidden":
            message = f"is not an option of {tags[-1]}" if tags else "is not an option"
            got += "; remove it or correct its name, `ray-surgeon schema` lists the fields"
        lines.append(f"  {path}: {message}{got}")
    return "\n".join(lines)
