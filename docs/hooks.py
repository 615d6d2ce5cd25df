"""Fills the reference of the job spec from its schema, so that the page cannot be wrong."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ray_surgeon.config.job import JobSpec

PLACE = "<!-- schema -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the placeholder on a page by the reference; called by MkDocs for every page."""
    return (
        markdown.replace(PLACE, "\n".join(reference())) if PLACE in markdown else markdown
    )


def reference() -> Iterator[str]:
    """Yield the lines of the reference: a table for every section."""
    schema = JobSpec.model_json_schema()
    yield from _table("The whole spec", schema)
    for name, section in schema["$defs"].items():
        yield from _table(name, section)


def _table(name: str, section: dict[str, Any]) -> Iterator[str]:
    yield f"\n## {name}\n\n{section.get('description', '')}\n"
    yield "| field | type | default | |\n|---|---|---|---|"
    required = section.get("required", [])
    for field, about in section.get("properties", {}).items():
        default = "required" if field in required else _default(about)
        description = about.get("description", "").replace("\n", " ")
        yield f"| `{field}` | {_type(about)} | {default} | {description} |"


def _default(about: dict[str, Any]) -> str:
    if "default" not in about:
        return "see text"
    value = about["default"]
    return (
        "defaults of the section"
        if isinstance(value, dict)
        else "`null`"
        if value is None
        else f"`{value}`"
    )


def _type(about: dict[str, Any]) -> str:
    if "$ref" in about:
        name = about["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    for key in ("anyOf", "oneOf"):
        if key in about:
            return " or ".join(_type(kind) for kind in about[key])
    if "const" in about:
        return f"`{about['const']}`"
    if "enum" in about:
        return ", ".join(f"`{value}`" for value in about["enum"])
    if about.get("type") == "array":
        items = about.get("items") or {"anyOf": about.get("prefixItems", [])}
        return f"list of {_type(items)}"
    return str(about.get("type", "any"))
