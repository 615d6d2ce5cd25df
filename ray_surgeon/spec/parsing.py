"""Job specs as text: YAML, overrides, and what is wrong with them in words."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from ray_surgeon.spec.base import REASON, refusing
from ray_surgeon.spec.evaluation import EvaluationSection
from ray_surgeon.spec.job import JobSpec

_Place = tuple[int | str, ...]
_YAML_ERRORS = (yaml.YAMLError, RecursionError, ValueError, LookupError, AttributeError)
"""PyYAML lets through what its constructors raise on values that do not fit their tags."""


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which refuses a key that is given twice: the last one would win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return a mapping."""
        seen = set[str]()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen and key.value != "<<":
                problem = f"{key.value} is given twice; remove one"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


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
    names_a_field = keys[0] == "evaluation" and EvaluationSection.model_fields.keys() & keys[1:2]
    if names_a_field and isinstance(document.get("evaluation"), list):
        document["evaluation"] = {"texts": document["evaluation"]}  # for which a list is short
    place: Any = document
    for number, key in enumerate(keys):
        at = _item(place, key, f"--set {override}: {'.'.join(keys[:number])}")
        if number == len(keys) - 1:
            place[at] = content
        elif isinstance(place, dict) and place.get(at) is None:  # absent, or switched off by null
            place[at] = {}
        place = place[at]


def _item(place: Any, key: str, where: str) -> str | int:
    """Return the key of a mapping, or the index of a list, that an override names."""
    if isinstance(place, dict):
        return key
    if not isinstance(place, list):
        raise ValueError(f"{where} is {place!r}, which has no fields; set it itself")
    if not key.isdecimal() or not int(key) < len(place):
        raise ValueError(
            f"{where} is a list with items 0 to {len(place) - 1}, and {key!r} is none of them"
        )
    return int(key)


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
    for problem in problems:
        others = [another["loc"] for another in problems if another is not problem]
        if _follows(problem, others, derived):
            continue
        place = [str(part) for part in problem["loc"]]
        tags = [part[1:-1] for part in place if part.startswith("<")]
        path = ".".join(part for part in place if not part.startswith("<")) or "spec"
        kind = problem["type"]
        message = _SENTENCES.get(kind, problem["msg"].removeprefix("Value error, "))
        shows_value = kind not in ("missing", "value_error")
        got = f" (got {reprlib.repr(problem['input'])[:80]})" if shows_value else ""
        if kind == "extra_forbidden":
            message = f"is not an option of {tags[-1]}" if tags else "is not an option"
            got += "; remove it or correct its name, `ray-surgeon schema` lists the fields"
        lines.append(f"  {path}: {message}{got}")
    return "\n".join(lines)


def _follows(problem: ErrorDetails, others: Sequence[_Place], derived: Sequence[str]) -> bool:
    """Whether other problems say it.

    Such are a default that was not made, and a list that is short of an item that is wrong itself.
    """
    place = problem["loc"]
    is_short = problem["type"] == "too_short" and any(loc[: len(place)] == place for loc in others)
    is_told = any(loc and loc[0] not in derived for loc in others)
    follows = bool(place) and place[0] in derived and is_told
    return is_short or follows or problem["type"] == "default_factory_not_called"


def absolute(uri: str) -> str:
    """Return a local path whole, and any other URI as it is."""
    return uri if "://" in uri else str(Path(uri).expanduser().resolve())


def with_absolute_paths(spec: JobSpec) -> JobSpec:
    """Return the spec with absolute local paths; workers run in other folders."""
    path = Path(spec.model.source).expanduser()
    is_local = os.path.exists(path)  # Path.exists raises where it may not look
    source = str(path.resolve()) if is_local else spec.model.source
    scratch = None if spec.memory.scratch is None else absolute(spec.memory.scratch)
    tasks = spec.evaluation.tasks
    if tasks is not None and tasks.include is not None:
        tasks = tasks.model_copy(update={"include": absolute(tasks.include)})
    changes: dict[str, Any] = {"model": {"source": source}, "memory": {"scratch": scratch}}
    changes |= {"evaluation": {"tasks": tasks}, "output": {"uri": absolute(spec.output.uri)}}
    changed = {name: getattr(spec, name).model_copy(update=new) for name, new in changes.items()}
    return spec.model_copy(update=changed)
