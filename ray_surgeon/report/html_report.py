"""Templates of this folder; reports as one HTML file that needs nothing else, figures inside."""

from __future__ import annotations

import functools
import time
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml

from ray_surgeon.checkpointing import RunDirectory
from ray_surgeon.report import bars, findings, plots, tables
from ray_surgeon.report import record as reports
from ray_surgeon.storage import files

_PAGE_EVERY_S = 60.0


def excerpt(text: str, length: int | None = None) -> str:
    """Return a text of a model or a user on one line, without control characters.

    Args:
        text: of any content.
        length: the most characters to show, beyond which the text is cut; None for all.
    """
    visible = "".join(c for c in text if c.isspace() or unicodedata.category(c)[0] != "C")
    line = " ".join(visible.split())
    if length is None or len(line) <= length:
        return line
    return line[: length - 3].rstrip() + "..."


def page(records: Sequence[Mapping[str, Any]]) -> str:
    """Return an HTML page about one run, or about several: a comparison, and then each of them.

    Args:
        records: contents of report.json; the runs need not have ended.
    """
    return rendered(
        "html_report.html.jinja",
        records=records,
        reports=reports,
        findings=findings,
        bars=bars,
        tables=tables,
        plots=plots,
    )


def rendered(template: str, **context: Any) -> str:
    """Return the text of a template of this folder."""
    environment = jinja2.Environment(trim_blocks=True, keep_trailing_newline=True)
    environment.loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment.autoescape = jinja2.select_autoescape(["html.jinja"])
    environment.undefined = jinja2.StrictUndefined
    environment.globals["size_name"] = reports.size_name
    environment.filters["excerpt"] = excerpt
    environment.filters["yaml"] = functools.partial(yaml.safe_dump, sort_keys=False)
    return environment.get_template(template).render(context)


class LivePage:
    """Writes report.html of a run, at most once a minute, and the plots at the end."""

    def __init__(self, run: RunDirectory) -> None:
        """Start the minute before the first page."""
        self._run = run
        self._last_s = time.monotonic()

    def draw(self, record: Mapping[str, Any], *, final: bool) -> None:
        """Write the page, and the plots too if it is the final one.

        A failure is recorded and ignored, because a drawing must not end a run of hours;
        ``ray-surgeon report`` can repeat it later.
        """
        if not final and time.monotonic() - self._last_s < _PAGE_EVERY_S:
            return
        self._last_s = time.monotonic()
        try:
            files.write_text(self._run.path("report.html"), page([record]))
            if final:
                self._write_plots(record)
        except Exception as error:  # whatever a plotting library raises
            self._run.add_event({"step": "drawing failed", "reason": repr(error)})

    def _write_plots(self, record: Mapping[str, Any]) -> None:
        for name, figure in plots.run_figures(record).items():
            uri = self._run.path("plots", name)
            files.write_text(f"{uri}.svg", plots.inline_svg(figure, name))
            plots.save(figure, f"{uri}.png")
