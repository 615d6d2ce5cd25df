"""The model card of an export."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

_TEMPLATE = Path(__file__).with_name("card.md.jinja")


def model_card(entry: Mapping[str, Any], source: str, facts: Mapping[str, Any]) -> str:
    """Return the text of README.md.

    Args:
        entry: the export's entry in the report.
        source: the dense model.
        facts: see `RunReport.model_card_facts`.
    """
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(entry=entry, source=source, facts=facts)
