"""``ray-surgeon family``: prints the entry of families.yaml for a model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

import yaml

from ray_surgeon.config.sections import ModelSection
from ray_surgeon.models.families import Family
from ray_surgeon.preparation.reading import opened
from ray_surgeon.run.arguments import quiet_transformers

_BAD_INPUT = 2


def entry_of(model_type: str, family: Family) -> str:
    """Return the entry of families.yaml for a family; fields with Llama's values are left out."""
    usual = Family()
    entry: dict[str, Any] = {}
    for field in fields(family):
        value = getattr(family, field.name)
        if value != getattr(usual, field.name):
            entry[field.name] = _plain(asdict(family)[field.name])
    return yaml.safe_dump({model_type: entry}, sort_keys=False)


def _plain(value: Any) -> Any:
    """Return a value with lists in place of tuples, which YAML lacks."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


@quiet_transformers()
def main(argv: Sequence[str]) -> int:
    """Print the entry for a model, described or probed, and return the exit code."""
    parser = argparse.ArgumentParser(
        "ray-surgeon family",
        description="Print the entry of ray_surgeon/models/families.yaml for a model. A model that "
        "has none is probed on a tiny copy with random weights; no weights are read.",
    )
    parser.add_argument("model", help="Hub id, folder or URI; config.json is enough")
    arguments = parser.parse_args(argv)
    try:
        _, _, layout = opened(ModelSection(source=arguments.model))
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return _BAD_INPUT
    sys.stdout.write(entry_of(layout.config.model_type, layout.family))
    return 0
