"""``ray-surgeon schema [SECTION]``: the JSON Schema of the job spec, or a table of a section."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

_WIDTH = 100


def main(argv: Sequence[str], path: Path) -> int:
    """Print the schema or the fields of a section, and return the exit code.

    Args:
        argv: arguments of the command.
        path: of the JSON Schema.
    """
    parser = argparse.ArgumentParser(
        "ray-surgeon schema",
        description="Print the JSON Schema of the job spec, or the fields of a section.",
    )
    parser.add_argument(
        "section",
        nargs="?",
        help="such as pruning or recovery.texts; spec for the sections themselves",
    )
    section = parser.parse_args(argv).section
    text = path.read_text(encoding="utf-8")
    if section is None:
        sys.stdout.write(text)
        return 0
    schema = json.loads(text)
    found = [schema]
    keys = [] if section == "spec" else section.split(".")
    for number, key in enumerate(keys):
        found = list(sections_below(schema, found, key))
        if not found:
            parser.error(_unknown(schema, keys[:number], key))
    for one in found:
        sys.stdout.write("\n".join(_lines(schema, one)) + "\n")
    return 0


def sections_below(
    schema: Mapping[str, Any], sections: Sequence[Mapping[str, Any]], key: str
) -> Iterator[Mapping[str, Any]]:
    """Yield the sections that a field of some sections may hold, each once."""
    seen = []
    for section in sections:
        field = section.get("properties", {}).get(key)
        if field is None:
            continue
        for option in _options(schema, field):
            if "properties" in option and option not in seen:
                seen.append(option)
                yield option


def _options(
    schema: Mapping[str, Any], field: Mapping[str, Any]
) -> Iterator[Mapping[str, Any]]:
    """Yield the alternatives of a field, with references resolved."""
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        yield from _options(schema, schema["$defs"][name])
        return
    nested = [*field.get("anyOf", ()), *field.get("oneOf", ())]
    if "properties" not in field and "items" in field:
        nested.append(field["items"])
    if not nested:
        yield field
    for option in nested:
        yield from _options(schema, option)


def _unknown(schema: Mapping[str, Any], path: Sequence[str], key: str) -> str:
    known = []
    sections = [schema]
    for part in path:
        sections = list(sections_below(schema, sections, part))
    for section in sections:
        for name in section.get("properties", {}):
            if next(sections_below(schema, [section], name), None) is not None:
                known.append(name)
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"; do you mean {near[0]}?" if near else f"; there are {', '.join(known)}"
    return f"there is no section {'.'.join([*path, key])}{hint}"


def _lines(schema: Mapping[str, Any], section: Mapping[str, Any]) -> Iterator[str]:
    """Yield a title, a description, and one paragraph for each field of a section."""
    title = str(section.get("title", "")).removesuffix("Section")
    about = " ".join(str(section.get("description", "")).split())
    yield f"{title}: {about}"
    required = section.get("required", ())
    for name, field in section["properties"].items():
        kinds = []
        for option in _options(schema, field):
            kind = _kind(option)
            if kind not in kinds:
                kinds.append(kind)
        default = "required"
        if name not in required:
            default = f"default {json.dumps(field.get('default'))}"
        yield f"\n  {name}  ({' | '.join(kinds)}; {default})"
        text = " ".join(str(field.get("description", "")).split())
        yield from textwrap.wrap(
            text, _WIDTH, initial_indent="      ", subsequent_indent="      "
        )


def _kind(option: Mapping[str, Any]) -> str:
    """Return the type of an alternative as a word."""
    if "properties" in option:
        return "section"
    if "const" in option:
        return str(option["const"])
    if "enum" in option:
        return " | ".join(map(str, option["enum"]))
    return str(option.get("type", "any"))
